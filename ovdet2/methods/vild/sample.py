"""Sample step of ViLD: attach cached region embeddings to a training sample.

Shapes: R regions, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes
from torch import Tensor

from ovdet2.caches.region_cache import MappedRegions, RegionCache, Regions
from ovdet2.caches.training_cache import known_regions, open_training_cache
from ovdet2.data.samples import Sample
from ovdet2.data.steps.step import Step
from ovdet2.vlm.fingerprint import Fingerprint


@dataclass(frozen=True)
class CachedRegions:
    """Regions of an image and their teacher embeddings.

    Attributes:
        boxes_xyxy: Tensor [R, 4] float32, in pixels of the augmented image, with positive area.
        embeddings: Tensor [R, D] float16, unit rows before rounding.
    """

    boxes_xyxy: Tensor
    embeddings: Tensor


class AttachCachedRegions(Step):
    """Attaches :class:`CachedRegions`.

    Attributes:
        cache: region cache of the training set.
        limit: maximum number of regions of an image; if there are more, they are drawn from numpy's global generator.
    """

    def __init__(self, cache: RegionCache, limit: int = 300) -> None:
        self.cache, self.limit = cache, limit

    def __call__(self, sample: Sample) -> None:
        """
        Raises:
            CacheError: see :func:`~ovdet2.caches.training_cache.known_regions`.
        """
        ann_ids = (annotation.get("id") for annotation in sample.annotations or ())
        cached = known_regions(self.cache, sample.image_id, sample.width, sample.height, ann_ids)
        assert sample.image is not None and sample.transforms is not None, "augment the image first"
        size = sample.image.shape[1], sample.image.shape[2]
        sample.attach(transform_regions(cached, sample.transforms, size, self.limit))

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Raise CacheError unless the cache is of this teacher."""
        self.cache.require_teacher(teacher, owner)


def open_region_cache(cfg: CfgNode, datasets: Sequence[str]) -> RegionCache:
    """Open the cache MODEL.VILD.REGION_CACHE for some data sets.

    Raises:
        UsageError, CacheError: see :func:`~ovdet2.caches.training_cache.open_training_cache`.
    """
    key = "MODEL.VILD.REGION_CACHE"
    return open_training_cache(cfg.MODEL.VILD.REGION_CACHE, datasets, cfg, key, "MODEL.VILD.WEIGHT")


def transform_regions(
    cached: MappedRegions | Regions, transforms: T.TransformList, image_size: tuple[int, int], limit: int
) -> CachedRegions:
    """Apply the geometric transforms of an image to its cached regions, as ViLD does.

    Regions are clipped to the image; regions outside are dropped.

    Args:
        cached: cached regions, in pixels of the original image.
        transforms: transforms that were applied to the image.
        image_size: (height, width) after the transforms.
        limit: maximum number of regions; if there are more, they are drawn from numpy's global generator.
    """
    # Same as TransformList.apply_box, but the corners are computed once and not per transform.
    corners = cached.boxes_xyxy.double().numpy()[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
    corners = transforms.apply_coords(corners).reshape(-1, 4, 2)
    boxes = Boxes(torch.from_numpy(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)).float())
    boxes.clip(image_size)
    kept = torch.nonzero(boxes.nonempty())[:, 0]
    if len(kept) == len(boxes) <= limit:
        # A copy: a view would send its full shard from the data loading worker to the trainer.
        return CachedRegions(boxes.tensor, cached.embeddings.clone())
    if len(kept) > limit:
        kept = kept[torch.from_numpy(np.random.permutation(len(kept))[:limit])]
    return CachedRegions(boxes.tensor[kept], cached.embeddings[kept])
