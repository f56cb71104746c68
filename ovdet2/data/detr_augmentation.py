"""The augmentation of DETR (Carion et al., ECCV 2020): sometimes, a crop at another scale before the resize."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import transforms as T

from ovdet2.errors import UsageError


def detr_crop(resize: Sequence[int], sides: Sequence[int], probability: float = 0.5) -> T.RandomApply:
    """Augmentation that, with a probability, resizes the short side and crops a rectangle; otherwise changes nothing.

    Placed before the ordinary resize and flip, it gives DETR's two augmentation lists, which both end with these two.
    Boxes, masks and cached regions go through the same transforms. Objects outside of the crop are dropped.

    Args:
        resize: short sides in pixels, one of which is drawn.
        sides: (minimum, maximum) pixels of each side of the rectangle. Height and width are drawn independently and
            limited by the image.
        probability: of the crop.

    Returns:
        Augmentation that draws from numpy's global generator.

    Raises:
        UsageError: no short side, or sides in the wrong order.
    """
    if not resize or min(resize) < 1 or len(sides) != 2 or not 0 < sides[0] <= sides[1]:
        raise UsageError(
            f"INPUT.DETR_CROP has RESIZE {tuple(resize)} and SIDES {tuple(sides)}: give short sides in pixels, and the "
            "minimum and maximum pixels of a side of the crop."
        )
    crop = T.AugmentationList(
        [T.ResizeShortestEdge(list(resize), sample_style="choice"), T.RandomCrop("absolute_range", tuple(sides))]
    )
    return T.RandomApply(crop, probability)
