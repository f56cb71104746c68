"""OV-Shapes in the format of LVIS v1, for the federated evaluation."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any


def lvis_json(
    data: Mapping[str, Any],
    masks: Sequence[Mapping[str, Any]],
    train: Mapping[str, Any],
    rare_ids: AbstractSet[int],
    split: str,
) -> dict[str, Any]:
    """Turn a COCO json of all objects into LVIS v1 form. Pure and deterministic.

    LVIS calls a class rare, common or frequent by its number of training images. Here "r" is exactly the novel classes,
    whatever their number, and the base classes are divided at their median into "c" and "f".

    Args:
        data: COCO json of the split.
        masks: run-length codes of its annotations, in their order.
        train: COCO json of the training split, which the counts and frequencies come from.
        rare_ids: novel category ids.
        split: "train2017", "val2017" or "test2017", the folder of the images.

    Returns:
        images (neg_category_ids: classes verified absent; not_exhaustive_category_ids: classes of which not
        every instance counts as annotated; coco_url), categories (frequency, synonyms, image_count, instance_count,
        ...) and annotations, boxes and masks.
    """
    images_of, instances_of = {}, {}
    for annotation in train["annotations"]:
        images_of.setdefault(annotation["category_id"], set()).add(annotation["image_id"])
        instances_of[annotation["category_id"]] = instances_of.get(annotation["category_id"], 0) + 1
    base_ids = sorted(
        (category["id"] for category in data["categories"] if category["id"] not in rare_ids),
        key=lambda category_id: (len(images_of.get(category_id, ())), category_id),
    )
    common = set(base_ids[: len(base_ids) // 2])
    categories = []
    for category in data["categories"]:
        category_id = category["id"]
        texture, shape = category["name"].split()
        categories.append(
            {
                "id": category_id,
                "name": category["name"].replace(" ", "_"),
                "synonyms": [category["name"].replace(" ", "_"), f"{shape}_({texture})"],
                "synset": f"{texture}_{shape}.n.01",
                "def": f"a {shape} whose surface is {texture}",
                "frequency": "r" if category_id in rare_ids else "c" if category_id in common else "f",
                "image_count": len(images_of.get(category_id, ())),
                "instance_count": instances_of.get(category_id, 0),
            }
        )
    present = {image["id"]: set() for image in data["images"]}
    for annotation in data["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    all_ids = [category["id"] for category in data["categories"]]
    images = [_lvis_image(image, sorted(present[image["id"]]), all_ids, split) for image in data["images"]]
    kept = ("id", "image_id", "category_id", "bbox", "area")
    annotations = [
        {**{key: annotation[key] for key in kept}, "segmentation": mask}
        for annotation, mask in zip(data["annotations"], masks, strict=True)
    ]
    return {"info": data["info"], "images": images, "categories": categories, "annotations": annotations}


def _lvis_image(image, present, all_ids, split):
    draw = random.Random(f"{split} {image['id']}")
    absent = [category_id for category_id in all_ids if category_id not in present]
    return {
        "id": image["id"],
        "file_name": image["file_name"],
        "coco_url": f"{split}/{image['file_name']}",
        "height": image["height"],
        "width": image["width"],
        # About a quarter of the absent classes, and one present class in a tenth of the images.
        "neg_category_ids": sorted(draw.sample(absent, len(absent) // 4)),
        "not_exhaustive_category_ids": [draw.choice(present)] if draw.random() < 0.1 else [],
    }
