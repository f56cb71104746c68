"""Region caches in training: opened and checked against data set and teacher, then checked image by image.

Shapes: R regions. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ovdet2.caches.region_cache import MappedRegions, RegionCache, Regions
from ovdet2.errors import CacheError, UsageError
from ovdet2.vlm.fingerprint import Fingerprint

logger = logging.getLogger(__name__)


def open_training_cache(
    folder: str, datasets: Sequence[str], cfg: CfgNode, key: str, needed_by: str, build: str
) -> RegionCache:
    """Open a region cache and check it against a training set and MODEL.TEACHER.

    Args:
        folder: of the cache.
        datasets: registered data sets of the training images.
        cfg: configuration; MODEL.TEACHER is read.
        key: configuration key that names the folder, for messages.
        needed_by: the configuration key that requires a cache, for messages.
        build: how to build it, for the message of a missing cache: options of ``ovdet2 cache build`` besides --dataset and
            --output.

    Raises:
        UsageError: no folder is given, or there are several data sets, whose image ids could collide in one cache.
        CacheError: see :class:`RegionCache`; or the cache is of another teacher or data set.
    """
    if not folder:
        raise UsageError(
            f"{needed_by} requires a region cache, but {key} is empty: give the folder of a cache made by "
            "ovdet2 cache build."
        )
    if len(datasets) != 1:
        raise UsageError(
            f"{key} is the region cache of one data set, and the source has {list(datasets)}: merge their jsons."
        )
    if not Path(folder).exists():
        raise CacheError(
            f"{key}: there is no region cache in {folder}. Build it by: ovdet2 cache build --dataset {datasets[0]} "
            f"--output {folder} {build}."
        )
    try:
        cache = RegionCache(folder)
    except CacheError as error:
        raise CacheError(f"{key}: {error}") from None
    stated = Fingerprint.stated(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED)
    cache.require_teacher(stated, "MODEL.TEACHER of the configuration")
    cache.require_dataset(datasets[0], MetadataCatalog.get(datasets[0]).ov_files()[0])
    if cache.unreadable:
        logger.warning(
            "%d images have no regions in %s, since they could not be read (image ids %s); once they are repaired, add "
            "--verify to: %s",
            *(len(cache.unreadable), folder, ", ".join(list(cache.unreadable)[:5]), cache.manifest["command"]),
        )
    return cache


def checked_regions(
    cache: RegionCache, image_id: int, width: int, height: int, ann_ids: Iterable[int | None]
) -> MappedRegions:
    """The cached regions of an image, after checking that they lie in the image and belong to its training annotations.

    Args:
        cache: of the training set.
        image_id: of the image.
        width, height: of the original image in pixels.
        ann_ids: of its annotations in the training set.

    Raises:
        CacheError: the cache has no entry for the image, a box outside of it, or a region of an unknown annotation.
    """
    cached = cache.regions(image_id)
    where = f"the region cache {cache.folder}, image id {image_id}"
    _require_inside(cached, width, height, where)
    known = cached.ann_ids.numpy()
    unknown = set(known[known >= 0].tolist()) - set(ann_ids)
    if unknown:
        raise CacheError(
            f"{where}: regions belong to the annotations {sorted(unknown)[:5]}, which the training set does not "
            "hold: a box of a novel class must not be trained on. Build the cache from the base-only annotations."
        )
    return cached


known_regions = checked_regions  # former name


def _require_inside(cached: MappedRegions | Regions, width: int, height: int, where: str) -> None:
    boxes = cached.boxes_xyxy.numpy()
    limits = np.array([width, height] * 2, dtype=np.float32) + 1
    inside = (boxes[:, :2] < boxes[:, 2:]).all(axis=1) & (boxes >= -1).all(axis=1) & (boxes <= limits).all(axis=1)
    if not inside.all():  # false for NaN too
        worst = boxes[~inside][0].tolist()
        raise CacheError(
            f"{where}: region {worst} is no box inside the image of {width}x{height} pixels: the cache was built from "
            "other images, build it again."
        )
