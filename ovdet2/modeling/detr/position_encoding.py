"""Sine encodings of positions in maps and of boxes, and the padding masks of maps.

Shapes: B images, h x w map, N boxes, C channels. Names: ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def level_masks(
    image_sizes: Sequence[tuple[int, int]],
    padded_size: Sequence[int],
    spatial_shapes: Sequence[Sequence[int]],
    device: torch.device | None = None,
) -> list[Tensor]:
    """Padding masks of the maps of a padded batch.

    Masks are resized by nearest-neighbour interpolation.

    Args:
        image_sizes: B (height, width) before padding at the right and the bottom.
        padded_size: (height, width) of the batch.
        spatial_shapes: (h, w) of every level.
        device: device of the result.

    Returns:
        list of bool Tensor [B, h, w], True where the map shows padding.
    """
    sizes = torch.tensor(image_sizes, device=device)
    rows = torch.arange(padded_size[0], device=device) < sizes[:, :1]
    columns = torch.arange(padded_size[1], device=device) < sizes[:, 1:]
    shown = (rows[:, None, :, None] & columns[:, None, None, :]).float()
    return [F.interpolate(shown, size=tuple(shape))[:, 0] == 0 for shape in spatial_shapes]


def valid_size(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(heights, widths), each integer Tensor [B]: the part of a map that is not padding.

    Args:
        mask: bool Tensor [B, h, w], True where padded; the rest is a rectangle at the upper left.
    """
    return (~mask[:, :, 0]).sum(1), (~mask[:, 0, :]).sum(1)


def sine_position(mask: Tensor, channels: int, dtype: torch.dtype, temperature: float = 10000.0) -> Tensor:
    """Sine position encoding of map cells. Positions in the valid part span (0, 2 pi) along each axis.

    Args:
        mask: bool Tensor [B, h, w], True where padded.
        channels: C, a multiple of 4; the first half encodes y, the second x.
        dtype: floating-point dtype of the result.

    Returns:
        Tensor [B, h, w, C]. Where the mask is True, values are finite but meaningless.
    """
    axes = []
    for size, valid in zip(mask.shape[1:], valid_size(mask)):
        centres = torch.arange(size, dtype=dtype, device=mask.device) + 0.5
        unit = centres / (valid[:, None].to(dtype) + 1e-6)
        axes.append(_sines(unit, channels // 2, temperature))
    # Each axis is encoded once for all cells along the other one, since sines are slow.
    y = axes[0][:, :, None].expand(-1, -1, mask.shape[2], -1)
    x = axes[1][:, None].expand(-1, mask.shape[1], -1, -1)
    return torch.cat([y, x], dim=-1)


def box_position(boxes_cxcywh: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Sine encoding of boxes, for the queries of a two-stage detector.

    Computed in float32 for every dtype: half precision cannot represent the low frequencies.

    Args:
        boxes_cxcywh: Tensor [B, N, 4] in [0, 1].
        channels: number of channels per coordinate, even.

    Returns:
        Tensor [B, N, 4 * channels], dtype of the boxes.
    """
    return _sines(boxes_cxcywh.float(), channels, temperature).flatten(-2).to(boxes_cxcywh.dtype)


def _sines(unit, channels, temperature):
    """Tensor [...] in (0, 1) -> [..., channels]: alternating sine and cosine, highest frequency first."""
    step = torch.arange(channels, dtype=unit.dtype, device=unit.device)
    period = temperature ** (2 * torch.div(step, 2, rounding_mode="floor") / channels)
    angle = (unit * (2 * math.pi))[..., None] / period
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
