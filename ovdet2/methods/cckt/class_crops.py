"""Sample a few annotated crops per class from the training set, for the contrast "class".

Shapes: K classes, m crops of each, D embedding dimension.
"""

import logging

import numpy as np
import torch
from torch import Tensor

from ovdet2.caches.region_cache import RegionCache
from ovdet2.data.samples import Records
from ovdet2.errors import CacheError

logger = logging.getLogger(__name__)


def class_crops(
    records: Records, cache: RegionCache, num_classes: int, per_class: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Teacher embeddings of up to m annotated boxes per class.

    Images are visited in a random order; each gives one box per class. Classes with too few images get further boxes in
    a second round. Only annotations of incomplete classes are read from the cache, so at most K x m embeddings are in
    memory.

    Args:
        records: sequence of Detectron2 records with "image_id" and "annotations", whose "category_id" is below K.
        cache: :class:`~ovdet2.caches.region_cache.RegionCache` of annotated boxes.
        num_classes: K.
        per_class: m.
        seed: seed of the random order.

    Returns:
        (crops, counts): Tensor [K, m, D] float16, unit rows, zero beyond a class's ``counts``, Tensor [K] int64.

    Raises:
        CacheError: no class has a crop; or see :meth:`RegionCache.regions`.
    """
    crops = torch.zeros((num_classes, per_class, cache.manifest["recipe"]["dim"]), dtype=torch.float16)
    counts = np.zeros(num_classes, dtype=np.int64)
    generator = np.random.default_rng(seed)
    order, used_ids = generator.permutation(len(records)).tolist(), set()
    for most in (1, per_class):
        for index in order:
            if counts.min() == per_class:
                break
            record = records[index]
            for label, ann_ids in _boxes_by_class(record, generator).items():
                missing = min(most, per_class - counts[label])
                new_ids = [ann_id for ann_id in ann_ids if ann_id not in used_ids][:missing]
                if new_ids:
                    rows, is_cached = cache.of_annotations(record["image_id"], new_ids)
                    count = int(is_cached.sum())
                    crops[label, counts[label] : counts[label] + count] = rows[is_cached]
                    counts[label] += count
                    used_ids.update(new_ids)
    _report(counts, cache)
    return crops, torch.from_numpy(counts)


def _boxes_by_class(record, generator):
    """{class: annotation ids in a random order}, without crowds."""
    boxes = {}
    annotations = record.get("annotations", ())
    for place in generator.permutation(len(annotations)).tolist():
        annotation = annotations[place]
        if not annotation.get("iscrowd", 0) and "id" in annotation:
            boxes.setdefault(annotation["category_id"], []).append(annotation["id"])
    return boxes


def _report(counts, cache):
    if not counts.any():
        raise CacheError(
            f"the region cache {cache.folder} has no crop of any annotation of the training set: build one with "
            "ovdet2 cache build --boxes annotations."
        )
    logger.info(
        "Class contrast: %d crops of %d classes; the rarest class has %d.", counts.sum(), len(counts), counts.min()
    )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        logger.warning(
            "%d of %d base classes have no crop in %s and take no part in the contrast, such as those of index %s.",
            len(empty), len(counts), cache.folder, ", ".join(map(str, empty[:5])),
        )  # fmt: skip
