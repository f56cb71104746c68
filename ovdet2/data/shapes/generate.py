"""Writing OV-Shapes to disk in the layout of COCO 2017, with annotations in COCO's and LVIS's formats.

<root>/ov_shapes/train2017/000000000001.jpg ...     <root>/ov_shapes/val2017/...
<root>/ov_shapes/annotations/instances_{train,val}2017.json      the whole truth, 65 classes
<root>/ov_shapes/annotations/ov_shapes_{train_base,val_all}.json made of them as OV-COCO's are of COCO's
<root>/ov_shapes/annotations/lvis_v1_{train,val}.json            the same truth as LVIS would state it, with masks
<root>/ov_shapes/annotations/ov_lvis_train_base.json             made of it as OV-LVIS's is of LVIS's
<root>/ov_shapes/manifest.json                                   written last: the mark of a finished generation
"""

import fcntl
import hashlib
import json
import multiprocessing
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.mask import encode
from tqdm import tqdm

from ovdet2.data.shapes.classes import BASE_NAMES, CLASS_NAMES
from ovdet2.data.shapes.lvis import lvis_json
from ovdet2.data.shapes.scenes import IMAGE_COUNTS, class_index, detection_scene
from ovdet2.errors import DataError, UsageError
from ovdet2.files import read_json, write_json

# Raised whenever the images or boxes of a seed change: figures of two versions are not comparable.
SCHEMA = "ovdet2/ov-shapes/2"
FOLDER = "ov_shapes"
ANNOTATION_FILES = (
    "instances_train2017.json",
    "instances_val2017.json",
    "ov_shapes_train_base.json",
    "ov_shapes_val_all.json",
    "lvis_v1_train.json",
    "lvis_v1_val.json",
    "ov_lvis_train_base.json",
)
_REDO = "delete that folder and run python -m ovdet2.data.shapes --root with its parent folder"


def ensure_generated(root, seed=0, counts=None, workers=2):
    """Generate OV-Shapes below ``root`` unless it is there. Safe to call from several processes at once.

    One process generates under a file lock, the others wait for it. A generation that was cut short has no manifest
    and is begun again, as is one that has lost an annotation file; images are overwritten with equal ones.

    Args:
        root: folder of all data sets (the images go to ``root/ov_shapes``).
        seed: of the data set, 0 for the benchmark.
        counts: {"train2017": n, "val2017": n}; None for the benchmark's 2,000 and 500.
        workers: processes that draw; 1 draws in this process. Any number gives the same files.

    Returns:
        The manifest, a dict.

    Raises:
        DataError: a finished data set of another seed or size is there.
        UsageError: a negative seed or a count below 1.
    """
    counts = dict(counts or IMAGE_COUNTS)
    if seed < 0 or set(counts) != set(IMAGE_COUNTS) or min(counts.values()) < 1:
        raise UsageError(f"OV-Shapes needs a seed >= 0 and at least one image per split, not {seed} and {counts}.")
    folder = Path(root) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        manifest_file = folder / "manifest.json"
        if manifest_file.is_file():
            manifest = read_json(manifest_file, _REDO)
            found = {key: manifest.get(key) for key in ("schema", "seed", "images")}
            if found != {"schema": SCHEMA, "seed": seed, "images": counts}:
                raise DataError(f"{folder} holds OV-Shapes of {found}, not of seed {seed} with {counts}: {_REDO}.")
            if _has_annotations(folder):
                return manifest
        return _generate(folder, seed, counts, workers)


def ensure_current(root):
    """Generate the benchmark below ``root`` if nothing is there; keep one of any seed or size that this version drew.

    Annotation files that are missing, as in a folder of before they existed, are made again, of the same seed and size.

    Raises:
        DataError: another version of ovdet2 drew it, so its figures are not comparable.
    """
    manifest_file = Path(root) / FOLDER / "manifest.json"
    if not manifest_file.is_file():
        ensure_generated(root)
        return
    manifest = read_json(manifest_file, _REDO)
    if manifest.get("schema") != SCHEMA:
        raise DataError(
            f"{manifest_file.parent} is OV-Shapes of {manifest.get('schema')}, this version draws {SCHEMA}: {_REDO}."
        )
    if not _has_annotations(manifest_file.parent):  # nothing is written, not even a lock, to a folder that is whole
        ensure_generated(root, manifest["seed"], manifest["images"])


def _has_annotations(folder):
    return all((folder / "annotations" / name).is_file() for name in ANNOTATION_FILES)


def draw_split(seed, split, count, workers=1, folder=None):
    """Draw the images of a split.

    Args:
        seed, split: as of :func:`~ovdet2.data.shapes.scenes.stream`.
        count: number of images.
        workers: processes; 1 draws in this one.
        folder: where to write the JPEG files; None writes none.

    Returns:
        (data, pixel_hash, masks): COCO json of all 65 classes, the SHA-256 over the pixels of the images in order, and
        the run-length codes of the objects' visible pixels, in the order of the annotations.
    """
    draw = partial(_draw_one, seed, split, folder)
    if workers > 1:
        # fork: the children only draw (no torch), and a script without a __main__ guard works too.
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            drawn = list(tqdm(pool.imap(draw, range(count), chunksize=16), total=count, desc=f"OV-Shapes {split}"))
    else:
        drawn = [draw(index) for index in tqdm(range(count), desc=f"OV-Shapes {split}")]
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
        "categories": categories(),
    }
    return data, pixels.hexdigest(), masks


def categories():
    """The 65 COCO category records by ascending id."""
    # Imported late: the registry of data sets needs Detectron2, drawing does not.
    from ovdet2.data.datasets.ov_shapes import OV_SHAPES

    records = []
    for category_id, name in sorted((*OV_SHAPES.base, *OV_SHAPES.novel)):
        records.append({"id": category_id, "name": name, "supercategory": name.split()[1]})
    return records


def _draw_one(seed, split, folder, index):
    from ovdet2.data.datasets.ov_shapes import OV_SHAPES

    scene = detection_scene(seed, split, index)
    name = f"{index + 1:012d}.jpg"
    if folder is not None:
        # A file cut short is no harm: without the manifest it is written again.
        Image.fromarray(scene.image).save(Path(folder) / name, quality=95)
    objects = []
    for placed in scene.objects:
        x0, y0, x1, y1 = placed.box_xyxy
        objects.append(
            {
                "category_id": OV_SHAPES.category_ids[class_index(placed)],
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
        [_run_length_code(mask) for mask in scene.masks],
        hashlib.sha256(scene.image.tobytes()).digest(),
    )


def _run_length_code(mask):
    """COCO's compressed run-length code of a (H, W) bool mask, ready for json."""
    code = encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def _generate(folder, seed, counts, workers):
    from ovdet2.data.datasets.lvis_split import prepare_lvis_train
    from ovdet2.data.datasets.ov_shapes import OV_SHAPES
    from ovdet2.data.datasets.prepare import prepare_split

    annotations = folder / "annotations"
    (folder / "manifest.json").unlink(missing_ok=True)
    truth, masks, pixel_hashes = {}, {}, {}
    for split, count in counts.items():
        (folder / split).mkdir(exist_ok=True)
        truth[split], pixel_hashes[split], masks[split] = draw_split(seed, split, count, workers, folder / split)
        write_json(annotations / f"instances_{split}.json", truth[split])
    for _ in prepare_split(annotations, FOLDER, OV_SHAPES, remedy=_REDO):
        pass
    novel_ids = {category_id for category_id, _ in OV_SHAPES.novel}
    for split in counts:
        lvis = lvis_json(truth[split], masks[split], truth["train2017"], novel_ids, split)
        write_json(annotations / f"lvis_v1_{split.removesuffix('2017')}.json", lvis)
    prepare_lvis_train(annotations / "lvis_v1_train.json", annotations / "ov_lvis_train_base.json", _REDO)
    manifest = {
        "schema": SCHEMA,
        "seed": seed,
        "images": counts,
        "annotations": {split: len(data["annotations"]) for split, data in truth.items()},
        "classes": {"base": len(BASE_NAMES), "all": len(CLASS_NAMES)},
        "pixels_sha256": pixel_hashes,
        "annotations_sha256": {split: annotations_hash(data) for split, data in truth.items()},
    }
    write_json(folder / "manifest.json", manifest, indent=1)
    return manifest


def annotations_hash(data):
    """Hex SHA-256 of a COCO json's content, independent of spacing and key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
