"""Square input: a batch of images padded to a square of a fixed side."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch.nn import functional as F

from ovdet2.errors import UsageError


def pad_to_square(images: ImageList, side: int) -> ImageList:
    """Pad a batch at the right and bottom with zeros, the mean colour of normalised images.

    Args:
        images: N images, normalised, in one tensor [N, C, H, W] with H and W of at most ``side``, or padded beyond it.
        side: S, in pixels.

    Returns:
        The same images in a tensor [N, C, S, S]; their sizes stay.

    Raises:
        UsageError: an image is larger than the square.
    """
    largest = max(max(size) for size in images.image_sizes)
    if largest > side:
        raise UsageError(
            f"an image of {largest} px is larger than the square of INPUT.SQUARE, {side} px: resize images to at most "
            "that size (INPUT.MAX_SIZE_TEST, INPUT.LSJ.SIDE, sizes of DATASETS.SOURCES), or increase INPUT.SQUARE."
        )
    height, width = images.tensor.shape[-2:]
    return ImageList(F.pad(images.tensor, (0, side - width, 0, side - height)), images.image_sizes)


def checked_side(cfg: CfgNode, divisibility: int) -> int:
    """INPUT.SQUARE, 0 if images are not padded to a square.

    Args:
        cfg: configuration.
        divisibility: number that the sides of the network's input must be multiples of; 0 for any.

    Raises:
        UsageError: it is no such multiple, or smaller than the images at test, of training or of the large-scale jitter.
    """
    keys = cfg.INPUT
    side, multiple = keys.SQUARE, max(divisibility, 1)
    if not side:
        return 0
    if side < 0 or side % multiple:
        raise UsageError(f"INPUT.SQUARE is {side}: it must be 0 or a positive multiple of {multiple}.")
    training = ("INPUT.LSJ.SIDE", keys.LSJ.SIDE) if keys.LSJ.ENABLED else ("INPUT.MAX_SIZE_TRAIN", keys.MAX_SIZE_TRAIN)
    for key, size in (("INPUT.MAX_SIZE_TEST", keys.MAX_SIZE_TEST), training):
        if side < size:
            raise UsageError(f"INPUT.SQUARE is {side}: it must be at least {key} ({size}).")
    return side
