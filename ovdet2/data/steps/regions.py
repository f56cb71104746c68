"""Cached region embeddings in a training sample.

Shapes: R regions, D embedding dimension. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes
from torch import Tensor

from ovdet2.caches.region_cache import MappedRegions, RegionCache, Regions
from ovdet2.caches.training_cache import known_regions
from ovdet2.data.samples import Sample
from ovdet2.data.steps.step import Step
from ovdet2.vlm.fingerprint import Fingerprint


@dataclass(frozen=True)
class CachedRegions:
    """Regions of an image and their teacher embeddings. A method that reads another cache has a subclass.

    Attributes:
        boxes_xyxy: Tensor [R, 4] float32, in pixels of the augmented image, with positive area.
        embeddings: Tensor [R, D] float16, unit rows before rounding.
    """

    boxes_xyxy: Tensor
    embeddings: Tensor


class AttachCachedRegions(Step):
    """Attaches the :class:`CachedRegions` of an image.

    Attributes:
        cache: region cache of the training set.
        limit: maximum number of regions of an image; if there are more, they are drawn from numpy's global generator.
        kind: class of the attached value.
    """

    def __init__(self, cache: RegionCache, limit: int = 300, kind: type[CachedRegions] = CachedRegions) -> None:
        self.cache, self.limit, self.kind = cache, limit, kind

    def __call__(self, sample: Sample) -> None:
        """
        Raises:
            CacheError: see :func:`~ovdet2.caches.training_cache.known_regions`.
        """
        ann_ids = (annotation.get("id") for annotation in sample.annotations or ())
        cached = known_regions(self.cache, sample.image_id, sample.width, sample.height, ann_ids)
        assert sample.image is not None and sample.transforms is not None, "augment the image first"
        size = sample.image.shape[1], sample.image.shape[2]
        boxes, embeddings = transform_regions(cached, sample.transforms, size, self.limit)
        sample.attach(self.kind(boxes, embeddings))

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Raise CacheError unless the cache is of this teacher."""
        self.cache.require_teacher(teacher, owner)


def transform_regions(
    cached: MappedRegions | Regions, transforms: T.TransformList, image_size: tuple[int, int], limit: int
) -> tuple[Tensor, Tensor]:
    """Apply the geometric transforms of an image to its cached regions.

    Regions are clipped to the image; regions outside are dropped.

    Args:
        cached: cached regions, in pixels of the original image.
        transforms: transforms that were applied to the image.
        image_size: (height, width) after them.
        limit: maximum number of regions, drawn from numpy's global generator if there are more.

    Returns:
        (boxes_xyxy, embeddings), see :class:`CachedRegions`.
    """
    # What TransformList.apply_box does, with the corners made once and not once for each transform.
    corners = cached.boxes_xyxy.double().numpy()[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
    corners = transforms.apply_coords(corners).reshape(-1, 4, 2)
    boxes = Boxes(torch.from_numpy(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)).float())
    boxes.clip(image_size)
    inside = torch.nonzero(boxes.nonempty())[:, 0]
    if len(inside) == len(boxes) <= limit:
        # A copy: a view would take its shard along from a loader process to the trainer.
        return boxes.tensor, cached.embeddings.clone()
    if len(inside) > limit:
        inside = inside[torch.from_numpy(np.random.permutation(len(inside))[:limit])]
    return boxes.tensor[inside], cached.embeddings[inside]
