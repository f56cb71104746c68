"""Box algebra of DETR: cxcywh and xyxy formats, and a generalised IoU that handles zero-area boxes."""

import torch
from torch import Tensor

# Smallest area in a denominator, as a fraction of the image: about 0.01 pixel of a 300 x 300 image. It keeps the
# quotients of zero-area boxes, and their gradients, finite. No real box is smaller.
_SMALLEST_AREA = 1e-9


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """Tensor [..., 4] (centre x, centre y, width, height) -> [..., 4] (left, top, right, bottom), in the same unit."""
    centre, size = boxes_cxcywh.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """The inverse of :func:`cxcywh_to_xyxy`."""
    first, last = boxes_xyxy.split(2, dim=-1)
    return torch.cat([(first + last) / 2, last - first], dim=-1)


def generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised IoU with broadcasting: IoU - (enclosing - union) / enclosing (Rezatofighi et al., CVPR 2019).

    torchvision's pairwise function gives NaN for two zero-area boxes. Its loss adds 1e-7 to the areas, which changes
    the result for normalised boxes of a few pixels.

    Args:
        boxes1_xyxy: Tensor [..., 4], normalised by the image's size, right >= left and bottom >= top.
        boxes2_xyxy: Tensor [..., 4], of a shape that broadcasts with it: ``a[:, None], b[None]`` compares all pairs,
            two of the same shape are compared row by row.

    Returns:
        Tensor [...], -1 to 1. Two zero-area boxes: -1 if their enclosing box has an area, else 0.
    """
    intersection = _area(_sides(torch.maximum, torch.minimum, boxes1_xyxy, boxes2_xyxy))
    union = _area(boxes1_xyxy[..., 2:] - boxes1_xyxy[..., :2]) + _area(boxes2_xyxy[..., 2:] - boxes2_xyxy[..., :2])
    union = union - intersection
    enclosing = _area(_sides(torch.minimum, torch.maximum, boxes1_xyxy, boxes2_xyxy))
    iou = intersection / union.clamp(min=_SMALLEST_AREA)
    return iou - (enclosing - union) / enclosing.clamp(min=_SMALLEST_AREA)


def _sides(of_first, of_last, boxes1, boxes2):
    """Width and height [..., 2] of the intersection or the enclosing box; 0 where they would be negative."""
    return (of_last(boxes1[..., 2:], boxes2[..., 2:]) - of_first(boxes1[..., :2], boxes2[..., :2])).clamp(min=0)


def _area(sides):
    return sides[..., 0] * sides[..., 1]
