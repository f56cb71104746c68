"""Noised boxes of dynamic queries (CLIP-DETR, Eq. 7), by three rules.

For a box (x, y, w, h) and u uniform in (0, 1), drawn separately for each of the four numbers:

- "literal", the paper's equation: centre + rho u side / 2, side + rho u side. Boxes move right and down, and grow.
- "signed": the same with 2 u - 1 in place of u. No published rule; a side can become as small as 0.
- "corners", the rule of DINO's denoising queries: each coordinate of both corners + rho (2 u - 1) side / 2.

Beyond rho 1 the last two can give negative sides, which are clamped. Mean IoU of a noised box with its object, over the
objects of OV-Shapes, rho 1: literal 0.361, signed 0.264, corners 0.401 (0.385 far from the image's border, which limits
the corners). The paper's larger setting, literal with rho 1.5, has 0.249.

Shapes: M objects, S sets. Names: ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

import torch
from torch import Tensor

from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh

SHIFTS = ("literal", "signed", "corners")

# The decoder refines boxes before a sigmoid. Where it is saturated, as at a side of 1, the gradient would be 0.
_CENTRES, _SIDES = (0.01, 0.99), (0.001, 0.99)


def moved_boxes(boxes_cxcywh: Tensor, shares: Tensor, rho: float, shift: str = "literal") -> Tensor:
    """Noised boxes.

    Args:
        boxes_cxcywh: Tensor [M, 4] in [0, 1].
        shares: Tensor [M, S, 4] in [0, 1), uniform random numbers u: of (x, y, w, h), with "corners" of
            (x0, y0, x1, y1).
        rho: bound of the noise, at least 0.
        shift: one of :data:`SHIFTS`.

    Returns:
        Tensor [M, S, 4] cxcywh, centres clamped to [0.01, 0.99], sides to [0.001, 0.99]. With "corners" the corners are
        clamped to the image before that, as in DINO.
    """
    boxes = boxes_cxcywh[:, None]
    sides = boxes[..., 2:]
    degree = rho * (shares if shift == "literal" else 2 * shares - 1)
    if shift == "corners":
        corners = cxcywh_to_xyxy(boxes) + degree * torch.cat([sides, sides], dim=-1) / 2
        centre, sides = xyxy_to_cxcywh(corners.clamp(0, 1)).split(2, dim=-1)
    else:
        centre = boxes[..., :2] + degree[..., :2] * sides / 2
        sides = sides + degree[..., 2:] * sides
    return torch.cat([centre.clamp(*_CENTRES), sides.clamp(*_SIDES)], dim=-1)
