"""Mosaics: several images on one canvas, each a pseudo region that keeps its caption (CLIM, Wu et al., 2023).

Shapes: B images of a batch, M mosaics, g cells a side of a mosaic, C channels, h x w image, H x W canvas. Boxes are
XYXY in pixels of the canvas, with pixel edges at integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ovdet2.errors import UsageError


def draw_mosaics(
    count: int, grids: Sequence[int] = (2, 3, 4), singles: int = 0, generator: torch.Generator | None = None
) -> tuple[list[Tensor], Tensor]:
    """Which images make up the mosaics of a batch; every image is used exactly once.

    The batch is used up in rounds of one mosaic of each grid and ``singles`` single images; of what is left, the
    largest grids that fit beside ``singles`` images are filled, at most one of each, and the rest stays single. With
    CLIM's grids, 29 of 32 images are in one mosaic of each and 3 are single.

    Args:
        count: B.
        grids: distinct numbers of cells a side, each at least 1.
        singles: images of a round that stay single, at least 0.
        generator: of the draw; None: images in their order, for batches that are drawn at random.

    Returns:
        (mosaics, rest): list of M Tensors [g, g] long, indices of images by row and column, and Tensor [U] long, those
        of the single images.

    Raises:
        UsageError: the batch is smaller than one mosaic and its single images, or the grids are no such numbers.
    """
    grids = sorted(grids)
    if not grids or grids[0] < 1 or len(set(grids)) < len(grids) or singles < 0:
        raise UsageError(
            f"mosaics of grids {grids} with {singles} single images: name each grid once, from 1 on, and no "
            "negative number of singles."
        )
    if count < grids[0] ** 2 + singles:
        raise UsageError(
            f"a batch of {count} images is smaller than one mosaic of {grids[0]}x{grids[0]} with {singles} single "
            f"images: give each process at least {grids[0] ** 2 + singles} images, or fewer cells or singles."
        )
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    mosaics, rest, used = [], [], 0

    def take(number):
        nonlocal used
        used += number
        return order[used - number : used]

    while count - used >= sum(grid**2 for grid in grids) + singles:
        mosaics += [take(grid**2).view(grid, grid) for grid in grids]
        rest.append(take(singles))
    for grid in reversed(grids):
        if grid**2 <= count - used - singles:
            mosaics.append(take(grid**2).view(grid, grid))
    return mosaics, torch.cat([*rest, take(count - used)])


def compose_mosaics(
    images: Tensor, mosaics: Sequence[Tensor], size: tuple[int, int], mode: str = "bicubic"
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Put images on canvases, and resize these.

    Args:
        images: Tensor [B, C, h, w], floating point; values may leave their range a little where ``mode`` overshoots.
        mosaics: list of M Tensors [g, g] long, of :func:`draw_mosaics`.
        size: (H, W) of the canvases; they have g * h x g * w pixels before.
        mode: of the resizing, "bicubic" or "bilinear", with anti-aliasing where it makes them smaller.

    Returns:
        (canvases, boxes, indices): Tensor [M, C, H, W] in the images' dtype, list of M Tensors [g * g, 4] float32, the
        cells row by row, and list of M Tensors [g * g] long, the image, and so the caption, of each box; all on the
        images' device.
    """
    height, width = size
    canvases = images.new_empty((len(mosaics), images.shape[1], height, width))
    grids = [len(mosaic) for mosaic in mosaics]
    for grid in set(grids):
        members = [number for number, other in enumerate(grids) if other == grid]
        cells = images[torch.stack([mosaics[number] for number in members]).to(images.device)]  # [m, g, g, C, h, w]
        whole = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # [m, C, g * h, g * w]
        if whole.shape[2:] != (height, width):
            smaller = whole.shape[2] > height or whole.shape[3] > width
            whole = F.interpolate(whole, (height, width), mode=mode, antialias=smaller, align_corners=False)
        canvases[members] = whole
    boxes = [grid_boxes(grid, height, width, images.device) for grid in grids]
    return canvases, boxes, [mosaic.flatten().to(images.device) for mosaic in mosaics]


def grid_boxes(grid: int, height: int, width: int, device: str | torch.device | None = None) -> Tensor:
    """The cells of a canvas, row by row: Tensor [grid * grid, 4] XYXY float32, at exact fractions of its sides."""
    edges = torch.arange(grid + 1, dtype=torch.float64, device=device)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x, y = edges * width / grid, edges * height / grid
    rows, columns = rows.flatten().to(edges.device), columns.flatten().to(edges.device)
    return torch.stack([x[columns], y[rows], x[columns + 1], y[rows + 1]], dim=1).float()
