"""Cutting regions out of an image and embedding them: ViLD's offline targets and the R-CNN style references.

Shapes: R regions, H x W image, S side of the teacher's input, D embedding dimension. Boxes are XYXY in pixels of the
image given, with pixel edges at integers.
"""

import torch
from torch.nn import functional as F
from torchvision.ops import roi_align


def scale_boxes(boxes_xyxy, factor, height, width):
    """Boxes enlarged about their centre by ``factor``, clipped to the image, at least one pixel wide and high.

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


def warp_crops(image, boxes_xyxy, size):
    """Crops warped to a square without keeping the aspect ratio, as ViLD does.

    RoIAlign with one sample per source pixel averages as it shrinks, so large boxes are anti-aliased.

    Args:
        image: Tensor [3, H, W], any range.
        boxes_xyxy: Tensor [R, 4].
        size: S.

    Returns:
        Tensor [R, 3, S, S], same range as ``image``.
    """
    return roi_align(image[None], [boxes_xyxy.to(image)], size, sampling_ratio=-1, aligned=True)


@torch.no_grad()
def embed_regions(teacher, image, boxes_xyxy, factors=(1.0, 1.5), batch_size=256):
    """Region embeddings of ViLD's Eq. 1: unit embeddings of the crop at each factor, summed and normalised again.

    The paper's V(crop) is CLIP's image embedding; crops are embedded unit-norm here, so both scales weigh the same.

    Args:
        teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
        image: Tensor [3, H, W], RGB in [0, 1].
        boxes_xyxy: Tensor [R, 4].
        factors: enlargements of the box.
        batch_size: crops per forward pass; bounds the memory for any R.

    Returns:
        Tensor [R, D], unit-norm float32.
    """
    height, width = image.shape[-2:]
    image = image.to(teacher.mean)
    parts = []
    for chunk in boxes_xyxy.to(image).split(max(1, batch_size // len(factors))):
        scaled = torch.cat([scale_boxes(chunk, factor, height, width) for factor in factors])
        embeddings = teacher.encode_image(warp_crops(image, scaled, teacher.image_size), batch_size)
        parts.append(F.normalize(embeddings.view(len(factors), len(chunk), embeddings.shape[1]).sum(dim=0), dim=-1))
    return torch.cat(parts)
