"""What ViLD adds to a training sample: cached region embeddings, see :mod:`ovdet2.data.steps.regions`."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode

from ovdet2.caches.region_cache import RegionCache
from ovdet2.caches.training_cache import open_training_cache
from ovdet2.data.steps.regions import AttachCachedRegions, CachedRegions

__all__ = ["AttachCachedRegions", "CachedRegions", "open_region_cache"]


def open_region_cache(cfg: CfgNode, datasets: Sequence[str]) -> RegionCache:
    """The cache of MODEL.VILD.REGION_CACHE for some data sets.

    Raises:
        UsageError, CacheError: see :func:`~ovdet2.caches.training_cache.open_training_cache`.
    """
    key = "MODEL.VILD.REGION_CACHE"
    build = "--config-file FILE MODEL.WEIGHTS WEIGHTS, with a detector trained without distillation, such as ViLD-text"
    return open_training_cache(cfg.MODEL.VILD.REGION_CACHE, datasets, cfg, key, "MODEL.VILD.WEIGHT", build)
