"""Pictures of what a model's feature map answers to a word (the paper's Figures 3 to 5).

Shapes: K words, h x w cells of the map, H x W image, D embedding dimension.
"""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from ovdet2.data.mosaic import compose_mosaics, draw_mosaics
from ovdet2.io.files import atomic_path
from ovdet2.report.labels import fonts_for, plain
from ovdet2.vlm.dense import dense_map, is_vit, pool_regions, resized_shape, stride_of

_WINDOW = 3  # cells a side of the window that a ResNet's attention pool sees around each cell


@torch.no_grad()
def response_maps(teacher, image, words, side=1024):
    """Cosine of each cell of the map to each word.

    A ViT's cells are embeddings; a ResNet's are made so by its attention pool over the cells around each.

    Args:
        teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
        image: Tensor [3, H, W] uint8.
        words: Tensor [K, D], unit rows.
        side: longest edge of the image at the model's input, in pixels.

    Returns:
        Tensor [K, h, w] float32 on the CPU.
    """
    visual, stride = teacher.clip.visual, stride_of(teacher.clip.visual)
    shape = resized_shape(*image.shape[-2:], side, "longest", stride)
    pixels = F.interpolate(image[None].to(teacher.mean) / 255, shape, mode=teacher.interpolation, antialias=True)
    cells = dense_map(visual, (pixels.clamp(0, 1) - teacher.mean) / teacher.std)
    if is_vit(visual):
        unit = F.normalize(cells[0].float(), dim=0)
        return torch.einsum("dhw,kd->khw", unit, words.to(unit)).cpu()
    height, width = cells.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = (torch.stack([x, y, x, y], dim=-1).reshape(-1, 4) + 0.5) * stride
    reach = torch.tensor([-1, -1, 1, 1]) * (_WINDOW * stride / 2)
    rows = pool_regions(visual, cells, [centres + reach])
    return (words.to(rows) @ rows.T).unflatten(1, (height, width)).cpu()


def mosaic_of(images, grid, side=256):
    """The first ``grid * grid`` images as one mosaic: Tensor [3, grid * side, grid * side] uint8 (Figure 3)."""
    squares = [F.interpolate(image[None].float(), (side, side), mode="bilinear", antialias=True) for image in images]
    mosaics, _ = draw_mosaics(grid * grid, (grid,))
    canvas, _, _ = compose_mosaics(torch.cat(squares[: grid * grid]), mosaics, (grid * side, grid * side), "bilinear")
    return canvas[0].round().clamp(0, 255).to(torch.uint8)


def draw_responses(path, image, words, maps, names):
    """Write a picture: a row per word, the image with each model's response over it, and what each cell is named.

    Args:
        path: PNG file.
        image: Tensor [3, H, W] uint8.
        words: K strings, at least one; the last row paints each cell by its best word if there are several.
        maps: list of Tensors [K, h, w], one per model.
        names: of the models.
    """
    rows, shown = len(words) + (len(words) > 1), image.permute(1, 2, 0).numpy()
    figure = Figure(figsize=(3.2 * (1 + len(maps)), 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1 + len(maps), squeeze=False)
    extent = (0, image.shape[2], image.shape[1], 0)
    colours = "tab20" if len(words) <= 20 else "nipy_spectral"
    for row in range(rows):
        axes[row, 0].imshow(shown, extent=extent)
        _title(axes[row, 0], words[row] if row < len(words) else "best word of each cell")
        for axis, cosines, name in zip(axes[row, 1:], maps, names, strict=True):
            axis.imshow(shown.mean(axis=2), extent=extent, cmap="gray")  # its colours would mix with the response's
            if row < len(words):
                found = cosines[row]
                axis.imshow(found.numpy(), extent=extent, alpha=0.6, cmap="viridis", interpolation="bilinear")
                _title(axis, f"{name}: {found.min():.2f} to {found.max():.2f}")
            else:
                best = cosines.argmax(dim=0).numpy()
                axis.imshow(
                    best, extent=extent, alpha=0.6, cmap=colours, vmin=0, vmax=len(words) - 1, interpolation="nearest"
                )
                _title(axis, ", ".join(words[index] for index in np.unique(best)[:4]), fontsize="small", wrap=True)
    for axis in axes.flat:
        axis.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def _title(axis, text, **options):
    axis.set_title(plain(text), family=fonts_for(plain(text)) or "sans-serif", **options)
