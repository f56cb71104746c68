"""Crop regions of an image and embed them: ViLD's offline targets, and references for dense region embeddings.

Shapes: R regions, F enlargements of each box, H x W image, S side of the teacher's input, D embedding dimension. Boxes
are XYXY in pixels of the image given, with pixel edges at integers. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.vlm.teacher import Teacher

POLICIES = ("warp", "centre_crop", "pad_square")


def scale_boxes(boxes_xyxy: torch.Tensor, factor: float, height: int, width: int) -> torch.Tensor:
    """Enlarge boxes about their centre by ``factor``, and clip them to the image; at least one pixel wide and high.

    Args:
        boxes_xyxy: Tensor [R, 4].
        factor: 1.5 gives ViLD's context crop.
        height, width: of the image, in pixels.

    Returns:
        Tensor [R, 4].
    """
    centres = (boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2
    half = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]) * (factor / 2)
    limits = boxes_xyxy.new_tensor([width, height])
    low = torch.minimum((centres - half).clamp(min=0), limits - 1)
    high = torch.minimum(torch.maximum(centres + half, low + 1), limits)
    return torch.cat([low, high], dim=1)


def crop_windows(
    boxes_xyxy: torch.Tensor, height: int, width: int, size: int, policy: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The integer pixel window of each box in the image, and its place in the S x S crop.

    Args:
        boxes_xyxy: Tensor [R, 4].
        height, width: of the image, in pixels.
        size: S.
        policy: "warp" fills the square without keeping the aspect ratio (ViLD); "centre_crop" takes the centre square,
            as CLIP's transform does, and drops the ends of long boxes; "pad_square" keeps the complete box and its
            aspect ratio, and fills the rest of the square with the teacher's mean colour.

    Returns:
        (windows, targets): int64 Tensors [R, 4] XYXY, in the image and in the crop, on the CPU; never empty.

    Raises:
        UsageError: unknown policy.
    """
    if policy not in POLICIES:
        raise UsageError(f"the crop policy is {policy!r}: choose one of {', '.join(POLICIES)}.")
    boxes = boxes_xyxy.detach().cpu().double()
    if policy == "centre_crop":
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        half = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1, keepdim=True) / 2
        boxes = torch.cat([centres - half, centres + half], dim=1)
    limits = torch.tensor([width, height])
    low = torch.minimum(boxes[:, :2].round().long().clamp(min=0), limits - 1)
    high = torch.minimum(torch.maximum(boxes[:, 2:].round().long(), low + 1), limits)
    targets = torch.tensor([0, 0, size, size]).repeat(len(boxes), 1)
    if policy == "pad_square":
        sides = high - low
        fitted = (size * sides / sides.amax(dim=1, keepdim=True)).round().long().clamp(min=1)
        start = (size - fitted) // 2
        targets = torch.cat([start, start + fitted], dim=1)
    return torch.cat([low, high], dim=1), targets


def crop_regions(
    image: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    size: int,
    policy: str = "warp",
    filter: str = "bicubic",
    fill: Sequence[float] = (0.0, 0.0, 0.0),
) -> torch.Tensor:
    """Crops at the teacher's input size, resized with anti-aliasing, as in CLIP's preprocessing.

    On the CPU this uses torch's 8-bit filter, which agrees with Pillow's to one grey level (:func:`pillow_crops` is the
    reference). On an accelerator it uses the same filter in float32, rounded to 8 bits.

    Args:
        image: Tensor [3, H, W] uint8.
        boxes_xyxy: Tensor [R, 4].
        size: S.
        policy: see :func:`crop_windows`.
        filter: "bicubic" or "bilinear", as in the teacher's training (:attr:`Teacher.interpolation`).
        fill: the colour around a "pad_square" crop, three numbers in [0, 1].

    Returns:
        Tensor [R, 3, S, S] uint8, on the image's device.

    Raises:
        UsageError: unknown policy, or an image that is not 8-bit.
    """
    if image.dtype != torch.uint8:
        raise UsageError(f"crops need an 8-bit image, this one is {image.dtype}: pass the decoded file.")
    windows, targets = crop_windows(boxes_xyxy, image.shape[-2], image.shape[-1], size, policy)
    crops = image.new_empty((len(windows), 3, size, size))
    if policy == "pad_square":
        crops[:] = (torch.tensor(fill) * 255).round().to(image).view(3, 1, 1)
    source = image if image.device.type == "cpu" else image.float()
    for crop, (x0, y0, x1, y1), (left, top, right, bottom) in zip(crops, windows.tolist(), targets.tolist()):
        crop[:, top:bottom, left:right] = _resize(source[:, y0:y1, x0:x1], (bottom - top, right - left), filter)
    return crops


def pillow_crops(
    image: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    size: int,
    policy: str = "warp",
    filter: str = "bicubic",
    fill: Sequence[float] = (0.0, 0.0, 0.0),
) -> torch.Tensor:
    """:func:`crop_regions` with Pillow, as in CLIP's published preprocessing: the slower reference."""
    import numpy as np
    from PIL import Image

    windows, targets = crop_windows(boxes_xyxy, image.shape[-2], image.shape[-1], size, policy)
    full = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    colour, resample = tuple(round(value * 255) for value in fill), Image.Resampling[filter.upper()]
    crops = []
    for window, (left, top, right, bottom) in zip(windows.tolist(), targets.tolist()):
        canvas = Image.new("RGB", (size, size), colour)
        canvas.paste(full.crop(window).resize((right - left, bottom - top), resample), (left, top))
        crops.append(torch.from_numpy(np.array(canvas)).permute(2, 0, 1))
    return torch.stack(crops) if crops else torch.zeros((0, 3, size, size), dtype=torch.uint8)


def combine_crops(embeddings: torch.Tensor, count: int) -> torch.Tensor:
    """ViLD's Eq. 1: the unit embeddings of a region's crops, summed and normalised.

    The paper's V(crop) is CLIP's image embedding. Here it has unit norm, so all enlargements have the same weight.

    Args:
        embeddings: Tensor [R * F, D], the crops of a region one after another.
        count: F.

    Returns:
        Tensor [R, D], unit rows.
    """
    dim = embeddings.shape[-1]
    return F.normalize(embeddings.view(-1, count, dim).sum(dim=1), dim=-1)


@torch.no_grad()
def embed_regions(
    teacher: Teacher,
    image: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    factors: Sequence[float] = (1.0, 1.5),
    batch_size: int = 256,
    policy: str = "warp",
) -> torch.Tensor:
    """Region embeddings by ViLD's Eq. 1.

    Args:
        teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
        image: Tensor [3, H, W] uint8, RGB.
        boxes_xyxy: Tensor [R, 4].
        factors: enlargements of the box.
        batch_size: crops per forward pass; bounds the memory for any R.
        policy: see :func:`crop_windows`.

    Returns:
        Tensor [R, D], unit-norm float32, on the teacher's device.
    """
    image = image.to(teacher.mean.device)
    boxes = boxes_to_cut(boxes_xyxy, factors, *image.shape[-2:])
    parts = [boxes.new_zeros((0, teacher.embed_dim), dtype=torch.float32, device=teacher.mean.device)]
    for chunk in boxes.split(max(1, batch_size // len(factors)) * len(factors)):
        crops = crop_regions(image, chunk, teacher.image_size, policy, teacher.interpolation, teacher.mean_colour)
        parts.append(combine_crops(teacher.encode_image(crops, batch_size), len(factors)))
    return torch.cat(parts)


def boxes_to_cut(boxes_xyxy: torch.Tensor, factors: Sequence[float], height: int, width: int) -> torch.Tensor:
    """The boxes of all crops, the F crops of a region one after another: Tensor [R * F, 4]."""
    scaled = [scale_boxes(boxes_xyxy, factor, height, width) for factor in factors]
    return torch.stack(scaled, dim=1).reshape(-1, 4)


def _resize(window, size, mode):
    """[3, h, w] -> [3, *size]; float32 values are rounded, since they are stored as uint8."""
    if window.shape[-2:] == size:
        return window
    resized = F.interpolate(window[None], size=size, mode=mode, antialias=True)[0]
    return resized if resized.dtype == torch.uint8 else resized.round().clamp(0, 255)
