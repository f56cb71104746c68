"""Large scale jitter (LSJ; Ghiasi et al., CVPR 2021): a resize over a wide range of scales and a crop to a square."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.data import transforms as T

from ovdet2.errors import UsageError


def large_scale_jitter(scales: Sequence[float], side: int) -> list[T.Augmentation]:
    """The augmentations that replace the ordinary resize; boxes, masks and cached regions go through them too.

    An image smaller than the square is not padded here: the detector pads its batch and masks the padding.

    Args:
        scales: (minimum, maximum) size that the image is resized to fit into, as multiples of the square.
        side: of the square, pixels.

    Returns:
        Augmentations that draw from numpy's global generator.

    Raises:
        UsageError: scales in the wrong order, or no side.
    """
    if len(scales) != 2 or not 0 < scales[0] <= scales[1] or side < 1:
        raise UsageError(
            f"INPUT.LSJ has SCALES {tuple(scales)} and SIDE {side}: give the smallest and the largest multiple of the "
            "square, and its side in pixels."
        )
    least, most = scales
    crop = T.FixedSizeCrop((side, side), pad=False)  # pyrefly: ignore[bad-argument-type]  its size has two sides
    return [T.ResizeScale(least, most, side, side), crop]
