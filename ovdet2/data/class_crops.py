"""Crops that stand for a class: a few annotated boxes of each, from all of the training set.

Shapes: K classes, m crops of each, D embedding dimension.
"""

import numpy as np
import torch

from ovdet2.errors import CacheError


def class_crops(records, cache, num_classes, per_class=32, seed=0):
    """The teacher's embeddings of some annotated boxes of each class.

    The images are taken in a random order until each class has its crops, and of an image only annotations of classes
    that lack some are read: frequent classes are full soon, and no more than K x m embeddings are ever held.

    Args:
        records: sequence of Detectron2 records with "image_id" and "annotations", whose "category_id" is below K.
        cache: :class:`~ovdet2.data.region_cache.RegionCache` of annotated boxes.
        num_classes: K.
        per_class: m.
        seed: of the order.

    Returns:
        (crops, counts): Tensor [K, m, D] float16, unit rows, zero beyond a class's ``counts``, Tensor [K] int64.

    Raises:
        CacheError: no class has a crop; or see :meth:`RegionCache.regions`.
    """
    crops = torch.zeros((num_classes, per_class, cache.manifest["recipe"]["dim"]), dtype=torch.float16)
    counts = np.zeros(num_classes, dtype=np.int64)
    for index in np.random.default_rng(seed).permutation(len(records)):
        record = records[int(index)]
        wanted = [
            (annotation["category_id"], annotation["id"])
            for annotation in record.get("annotations", ())
            if not annotation.get("iscrowd", 0) and "id" in annotation and counts[annotation["category_id"]] < per_class
        ]
        if not wanted:
            continue
        rows, found = cache.of_annotations(record["image_id"], [ann_id for _, ann_id in wanted])
        for (label, _), row, there in zip(wanted, rows, found.tolist()):
            if there and counts[label] < per_class:
                crops[label, counts[label]] = row
                counts[label] += 1
        if counts.min() == per_class:
            break
    if not counts.any():
        raise CacheError(
            f"the region cache {cache.folder} has no crop of any annotation of the training set: build one with "
            "tools/build_region_cache.py --boxes annotations."
        )
    return crops, torch.from_numpy(counts)
