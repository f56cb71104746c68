"""The augmentation of DETR (Carion et al., ECCV 2020): now and then a crop, at another scale, before the resize."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import transforms as T

from ovdet2.errors import UsageError


def detr_crop(resize: Sequence[int], sides: Sequence[int], probability: float = 0.5) -> T.RandomApply:
    """With a probability, resize the short side and cut out a rectangle; else change nothing.

    Put before the ordinary resize and flip it gives DETR's two lists, which both end with these. Boxes, masks and
    cached regions go through the same transforms; what is cropped away is left out.

    Args:
        resize: short sides in pixels, one of which is drawn.
        sides: (least, most) pixels of each side of the rectangle, drawn apart for height and width and limited by the
            image.
        probability: of the crop.

    Returns:
        It draws from numpy's global generator.

    Raises:
        UsageError: no short side, or sides in the wrong order.
    """
    if not resize or min(resize) < 1 or len(sides) != 2 or not 0 < sides[0] <= sides[1]:
        raise UsageError(
            f"INPUT.DETR_CROP has RESIZE {tuple(resize)} and SIDES {tuple(sides)}: give short sides in pixels, and the "
            "least and most pixels of a side of the crop."
        )
    crop = T.AugmentationList(
        [T.ResizeShortestEdge(list(resize), sample_style="choice"), T.RandomCrop("absolute_range", tuple(sides))]
    )
    return T.RandomApply(crop, probability)
