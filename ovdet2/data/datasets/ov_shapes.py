"""OV-Shapes (48 base, 17 novel classes): ov_shapes_train_base and ov_shapes_val_all, generated on first use.

Its classes have the sparse category ids of OV-COCO: base classes those of base classes, novel those of novel. Thus the
code that maps ids is tested without COCO. On disk it has the layout of COCO 2017:

<root>/ov_shapes/train2017/000000000001.jpg ...     <root>/ov_shapes/val2017/...
<root>/ov_shapes/annotations/instances_{train,val}2017.json      all annotations, 65 classes
<root>/ov_shapes/annotations/ov_shapes_{train_base,val_all}.json derived from them as OV-COCO is from COCO
<root>/ov_shapes/annotations/lvis_v1_{train,val}.json            the same annotations in LVIS format, with masks
<root>/ov_shapes/annotations/ov_lvis_train_base.json             derived from it as OV-LVIS is from LVIS
<root>/ov_shapes/manifest.json                                   written last; its presence marks a complete data set
"""

from __future__ import annotations

import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.lvis_split import frequency_split, prepare_lvis_train
from ovdet2.data.datasets.prepare import prepare_split
from ovdet2.data.datasets.register import data_root, register_dataset
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_json, write_json
from ovdet2.io.manifests import fault_of
from ovdet2.ov_shapes.world.classes import BASE_NAMES, CLASS_NAMES, NOVEL_NAMES, UNSEEN_COMBINATIONS, UNSEEN_NOUNS
from ovdet2.ov_shapes.world.draw import annotations_hash, draw_split
from ovdet2.ov_shapes.world.lvis import lvis_json
from ovdet2.ov_shapes.world.scenes import IMAGE_COUNTS

# The number is raised whenever the images or boxes of a seed change: results on two versions are not comparable.
SCHEMA = "ovdet2/ov-shapes/2"
FOLDER = "ov_shapes"
_FORM = {"schema": str, "seed": int, "images": dict.fromkeys(IMAGE_COUNTS, int)}
ANNOTATION_FILES = (
    "instances_train2017.json",
    "instances_val2017.json",
    "ov_shapes_train_base.json",
    "ov_shapes_val_all.json",
    "lvis_v1_train.json",
    "lvis_v1_val.json",
    "ov_lvis_train_base.json",
)
_REDO = "delete that folder and run python -m ovdet2.ov_shapes --root with its parent folder"
_BASE = tuple(zip((category_id for category_id, _ in OV_COCO.base), BASE_NAMES, strict=True))
_NOVEL = tuple(zip((category_id for category_id, _ in OV_COCO.novel), NOVEL_NAMES, strict=True))

OV_SHAPES = Split(
    name="OV-Shapes 48/17",
    base=_BASE,
    novel=_NOVEL,
    groups={
        "unseen_nouns": tuple(category_id for category_id, name in _NOVEL if name in UNSEEN_NOUNS),
        "unseen_combinations": tuple(category_id for category_id, name in _NOVEL if name in UNSEEN_COMBINATIONS),
    },
)


def ensure_generated(
    root: str | Path, seed: int = 0, counts: Mapping[str, int] | None = None, workers: int = 2
) -> dict[str, Any]:
    """Generate OV-Shapes below ``root`` unless it exists. Several processes may call it concurrently.

    One process generates under a file lock, the others wait for it. An interrupted generation has no manifest and is
    started again, as is a data set that lacks an annotation file; images are overwritten with equal ones.

    Args:
        root: folder of all data sets (the images go to ``root/ov_shapes``).
        seed: of the data set, 0 for the benchmark.
        counts: {"train2017": n, "val2017": n}; None for the benchmark's 2,000 and 500.
        workers: processes that draw; 1 draws in this process. Any number gives the same files.

    Returns:
        The manifest.

    Raises:
        DataError: the folder holds a complete data set of another seed or size.
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
            manifest = _read_manifest(manifest_file)
            found = {key: manifest.get(key) for key in ("schema", "seed", "images")}
            if found != {"schema": SCHEMA, "seed": seed, "images": counts}:
                raise DataError(f"{folder} holds OV-Shapes of {found}, not of seed {seed} with {counts}: {_REDO}.")
            if _has_annotations(folder):
                return manifest
        return _generate(folder, seed, counts, workers)


def ensure_current(root: str | Path) -> None:
    """Generate the benchmark below ``root`` unless this version has generated one there, of any seed or size.

    Missing annotation files (earlier versions did not write all of them) are made again, with the same seed and size.

    Raises:
        DataError: another version of ovdet2 generated it, so results on it are not comparable.
    """
    manifest_file = Path(root) / FOLDER / "manifest.json"
    if not manifest_file.is_file():
        ensure_generated(root)
        return
    manifest = _read_manifest(manifest_file)
    if manifest.get("schema") != SCHEMA:
        raise DataError(
            f"{manifest_file.parent} is OV-Shapes of {manifest.get('schema')}, this version draws {SCHEMA}: {_REDO}."
        )
    if not _has_annotations(manifest_file.parent):  # a complete folder may be read-only: not even a lock is written
        ensure_generated(root, manifest["seed"], manifest["images"])


def _read_manifest(path):
    """The manifest of this or of another version.

    Raises:
        DataError: it is damaged.
    """
    manifest = read_json(path, _REDO)
    current = isinstance(manifest, dict) and manifest.get("schema") == SCHEMA
    fault = fault_of(manifest, _FORM if current else {"schema": str})
    if fault:
        raise DataError(f"{path} is damaged ({fault}): {_REDO}.")
    return manifest


def _has_annotations(folder):
    return all((folder / "annotations" / name).is_file() for name in ANNOTATION_FILES)


def _generate(folder, seed, counts, workers):
    annotations = folder / "annotations"
    (folder / "manifest.json").unlink(missing_ok=True)
    truth, masks, pixel_hashes = {}, {}, {}
    for split, count in counts.items():
        (folder / split).mkdir(exist_ok=True)
        truth[split], pixel_hashes[split], masks[split] = draw_split(
            seed, split, count, OV_SHAPES.category_ids, workers, folder / split
        )
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


def _prepare():
    ensure_current(data_root())


for _name, _images, _base_only in (("train_base", "train2017", True), ("val_all", "val2017", False)):
    register_dataset(
        f"ov_shapes_{_name}",
        f"ov_shapes/annotations/ov_shapes_{_name}.json",
        f"ov_shapes/{_images}",
        OV_SHAPES,
        prepare=_prepare,
        base_only=_base_only,
        remedy="run python -m ovdet2.ov_shapes",
    )

# The same images and annotations in LVIS format, with masks: the rare classes are novel.
for _name, _json, _base_only in (("train_base", "ov_lvis_train_base", True), ("val", "lvis_v1_val", False)):
    register_dataset(
        f"ov_shapes_lvis_{_name}",
        f"ov_shapes/annotations/{_json}.json",
        "ov_shapes",
        frequency_split,
        metric="ov_lvis",
        prepare=_prepare,
        base_only=_base_only,
        masks=True,
        remedy="run python -m ovdet2.ov_shapes",
    )
