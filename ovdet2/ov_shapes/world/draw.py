"""Drawing a split of OV-Shapes: images, the COCO json of all objects, masks. Independent of registered data sets."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ovdet2.io.masks import run_length_code
from ovdet2.io.progress import progress_bar
from ovdet2.ov_shapes.world.classes import CLASS_NAMES
from ovdet2.ov_shapes.world.scenes import class_index, detection_scene


def draw_split(
    seed: int,
    split: str,
    count: int,
    category_ids: Sequence[int],
    workers: int = 1,
    folder: str | Path | None = None,
) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """Draw the images of a split.

    Args:
        seed, split: as of :func:`~ovdet2.ov_shapes.world.scenes.stream`.
        count: number of images.
        category_ids: ids of the 65 classes, in the order of CLASS_NAMES.
        workers: processes; 1 draws in this one.
        folder: where to write the JPEG files; None writes none.

    Returns:
        (data, pixel_hash, masks): COCO json of all 65 classes, the SHA-256 over the pixels of the images in order, and
        the run-length codes of the objects' visible pixels, in the order of the annotations.
    """
    draw = partial(draw_image, seed, split, category_ids, folder)
    if workers > 1:
        # fork: the children only draw (no torch), and a script without a __main__ guard works too.
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            drawn = list(
                progress_bar(pool.imap(draw, range(count), chunksize=16), total=count, desc=f"OV-Shapes {split}")
            )
    else:
        drawn = [draw(index) for index in progress_bar(range(count), desc=f"OV-Shapes {split}")]
    pixels, images, annotations, masks = hashlib.sha256(), [], [], []
    for image, objects, codes, digest in drawn:
        pixels.update(digest)
        images.append(image)
        masks.extend(codes)
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **entry})
    data = {
        "info": {"description": f"OV-Shapes {split}, seed {seed}, all 65 classes"},
        "images": images,
        "annotations": annotations,
        "categories": categories(category_ids),
    }
    return data, pixels.hexdigest(), masks


def categories(category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The 65 COCO category records by ascending id."""
    pairs = sorted(zip(category_ids, CLASS_NAMES, strict=True))
    return [{"id": number, "name": name, "supercategory": name.split()[1]} for number, name in pairs]


def draw_image(
    seed: int, split: str, category_ids: Sequence[int], folder: str | Path | None, index: int
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], bytes]:
    """Draw one image of a split; arguments as of :func:`draw_split`, ``index`` from 0.

    Returns:
        (image, objects, masks, digest): COCO records of the image and of its objects (without ids), the run-length
        codes of the objects' visible pixels, and the SHA-256 of the (H, W, 3) uint8 RGB pixels as drawn.
    """
    scene = detection_scene(seed, split, index)
    name = f"{index + 1:012d}.jpg"
    if folder is not None:
        # A truncated file is harmless: without the manifest it is written again.
        Image.fromarray(scene.image).save(Path(folder) / name, quality=95)
    objects = []
    for placed in scene.objects:
        x0, y0, x1, y1 = placed.box_xyxy
        objects.append(
            {
                "category_id": category_ids[class_index(placed)],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": placed.area,
                "iscrowd": 0,
                "color": placed.color,
            }
        )
    height, width = scene.image.shape[:2]
    image = {"id": index + 1, "file_name": name, "height": height, "width": width}
    return (
        image,
        objects,
        [run_length_code(mask) for mask in scene.masks],
        hashlib.sha256(scene.image.tobytes()).digest(),
    )


def annotations_hash(data: Mapping[str, Any]) -> str:
    """Hex SHA-256 of a COCO json's content, independent of spacing and key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
