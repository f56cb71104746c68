"""Mosaics: several images on one canvas, each a pseudo region with the caption of its image (CLIM, Wu et al., 2023).

Shapes: B images of a batch, M mosaics, g cells per side of a mosaic, C channels, h x w image, H x W canvas. Boxes are
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
    """Assign the images of a batch to mosaics; every image is used exactly once.

    The batch is divided into rounds of one mosaic of each grid and ``singles`` single images. The images that are left
    fill the largest grids that fit next to ``singles`` images, at most one of each; the others stay single. With
    CLIM's grids, 29 of 32 images are in one mosaic of each grid and 3 are single.

    Args:
        count: B.
        grids: distinct numbers of cells per side, each at least 1.
        singles: images of a round that stay single, at least 0.
        generator: of the random assignment; None: images in their order, for batches that are already in random order.

    Returns:
        (mosaics, rest): list of M Tensors [g, g] long, indices of images by row and column; and Tensor [U] long,
        indices of the single images.

    Raises:
        UsageError: the batch is smaller than one mosaic and its single images, or the grids are invalid.
    """
    grids = sorted(grids)
    if not grids or grids[0] < 1 or len(set(grids)) < len(grids) or singles < 0:
        raise UsageError(
            f"mosaics of grids {grids} with {singles} single images: give each grid once, each at least 1, and a "
            "number of single images that is not negative."
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
    """Tile images to canvases, and resize the canvases.

    Args:
        images: Tensor [B, C, h, w], floating point.
        mosaics: list of M Tensors [g, g] long, of :func:`draw_mosaics`.
        size: (H, W) of the canvases; before the resize a canvas has g * h x g * w pixels.
        mode: of the resize, "bicubic" (may overshoot the value range slightly) or "bilinear"; with anti-aliasing when
            it shrinks.

    Returns:
        (canvases, boxes, indices), all on the images' device:
        Tensor [M, C, H, W] in the images' dtype; list of M Tensors [g * g, 4] float32, the cells row by row; list of M
        Tensors [g * g] long, the index of the image (and so of the caption) of each box.
    """
    height, width = size
    canvases = images.new_empty((len(mosaics), images.shape[1], height, width))
    grids = [len(mosaic) for mosaic in mosaics]
    for grid in set(grids):
        members = [number for number, other in enumerate(grids) if other == grid]
        cells = images[torch.stack([mosaics[number] for number in members]).to(images.device)]  # [m, g, g, C, h, w]
        tiled = cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # [m, C, g * h, g * w]
        if tiled.shape[2:] != (height, width):
            smaller = tiled.shape[2] > height or tiled.shape[3] > width
            tiled = F.interpolate(tiled, (height, width), mode=mode, antialias=smaller, align_corners=False)
        canvases[members] = tiled
    boxes = [grid_boxes(grid, height, width, images.device) for grid in grids]
    return canvases, boxes, [mosaic.flatten().to(images.device) for mosaic in mosaics]


def grid_boxes(grid: int, height: int, width: int, device: str | torch.device | None = None) -> Tensor:
    """The cells of a canvas, row by row: Tensor [grid * grid, 4] XYXY float32, at exact fractions of its sides."""
    edges = torch.arange(grid + 1, dtype=torch.float64, device=device)
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x, y = edges * width / grid, edges * height / grid
    rows, columns = rows.flatten().to(edges.device), columns.flatten().to(edges.device)
    return torch.stack([x[columns], y[rows], x[columns + 1], y[rows + 1]], dim=1).float()
