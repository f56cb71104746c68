"""Augmentation of the small images that the teachers and the trunk of OV-Shapes are trained on."""

import math

import torch
from torch.nn import functional as F

# Resizing of training images; crops must be resized in the same way.
INTERPOLATION = "bilinear"


def augment(pixels: torch.Tensor, side: int, random: torch.Generator, coarsen: bool) -> torch.Tensor:
    """Random crop with change of scale and aspect, flip, exposure and, if requested, loss of resolution.

    Args:
        pixels: float Tensor [N, 3, H, W] in [0, 1].
        side: S of the output.
        random: torch Generator.
        coarsen: let three quarters of the batch lose resolution, like enlarged small images on the web.

    Returns:
        Tensor [N, 3, S, S] in [0, 1].
    """
    count = len(pixels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    scale = torch.exp(uniform(math.log(0.5), math.log(1.05)))  # side of the crop as a share of the image's
    aspect = torch.exp(uniform(-0.35, 0.35))
    extent = torch.stack([scale * aspect.sqrt(), scale / aspect.sqrt()], dim=1)
    center = uniform(-1.0, 1.0, 2) * (1.0 - extent).clamp(min=0.0)
    flip = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = extent[:, 0] * flip, extent[:, 1], center
    grid = F.affine_grid(theta, [count, 3, side, side], align_corners=False)
    crops = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    parts = list(crops.chunk(4))  # each later quarter shares one resolution
    for i in range(1, len(parts) if coarsen else 0):
        small = int(torch.randint(20, side + 1, (1,), generator=random))
        coarse = F.interpolate(parts[i], size=(small, small), mode=INTERPOLATION, antialias=True, align_corners=False)
        parts[i] = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    return (torch.cat(parts) * uniform(0.8, 1.15, 1, 1, 1)).clamp(0.0, 1.0)
