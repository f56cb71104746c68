"""OV-Shapes (48 base, 17 novel classes): ov_shapes_train_base and ov_shapes_val_all, generated on first use.

ov_shapes_test, of which only final tables are made, is drawn when it is first used itself. Settings are chosen on
ov_shapes_val_all.

Its classes have the sparse category ids of OV-COCO: base classes those of base classes, novel those of novel. Thus the
code that maps ids is tested without COCO. On disk it has the layout of COCO 2017:

<root>/ov_shapes/train2017/000000000001.jpg ...     <root>/ov_shapes/val2017/...
<root>/ov_shapes/annotations/instances_{train,val}2017.json      all annotations, 65 classes
<root>/ov_shapes/annotations/ov_shapes_{train_base,val_all}.json derived from them as OV-COCO is from COCO
<root>/ov_shapes/annotations/lvis_v1_{train,val}.json            the same annotations in LVIS format, with masks
<root>/ov_shapes/annotations/ov_lvis_train_base.json             derived from it as OV-LVIS is from LVIS
<root>/ov_shapes/manifest.json                                   written last; its presence marks a complete data set
<root>/ov_shapes/test2017/...                                    drawn on first use of ov_shapes_test
<root>/ov_shapes/annotations/{instances_test2017,ov_shapes_test,lvis_v1_test}.json
<root>/ov_shapes/manifest_test.json                              of the test split, written last
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.lvis_split import frequency_split, prepare_lvis_train
from ovdet2.data.datasets.prepare import prepare_file, prepare_split
from ovdet2.data.datasets.register import data_root, register_dataset
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.files import read_json, write_json
from ovdet2.io.manifests import fault_of
from ovdet2.ov_shapes.world.classes import BASE_NAMES, CLASS_NAMES, NOVEL_NAMES, UNSEEN_COMBINATIONS, UNSEEN_NOUNS
from ovdet2.ov_shapes.world.draw import annotations_hash, draw_split
from ovdet2.ov_shapes.world.lvis import lvis_json
from ovdet2.ov_shapes.world.scenes import IMAGE_COUNTS, TEST_COUNT, TEST_SPLIT

logger = logging.getLogger(__name__)
# The number is raised whenever the images or boxes of a seed change: results on two versions are not comparable.
SCHEMA = "ovdet2/ov-shapes/2"
FOLDER = "ov_shapes"
_FORM = {"schema": str, "seed": int, "images": dict.fromkeys(IMAGE_COUNTS, int)}
_TEST_FORM = {"schema": str, "seed": int, "images": {TEST_SPLIT: int}, "pixels_sha256": {TEST_SPLIT: str}}
# Hashes of the pixels and annotations of the benchmark, seed 0: of each split, and of single test images.
HASHES = Path(__file__).resolve().parents[2] / "assets" / "ov_shapes" / "hashes.json"
ANNOTATION_FILES = (
    "instances_train2017.json",
    "instances_val2017.json",
    "ov_shapes_train_base.json",
    "ov_shapes_val_all.json",
    "lvis_v1_train.json",
    "lvis_v1_val.json",
    "ov_lvis_train_base.json",
)
TEST_ANNOTATION_FILES = ("instances_test2017.json", "ov_shapes_test.json", "lvis_v1_test.json")
_REDO = "delete that folder and run python -m ovdet2.ov_shapes --root with its parent folder"
_REDO_TEST = "delete that file, and run ovdet2 dataset prepare ov-shapes --test"
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
    with _locked(folder):
        manifest_file = folder / "manifest.json"
        if manifest_file.is_file():
            manifest = _read_manifest(manifest_file)
            found = {key: manifest.get(key) for key in ("schema", "seed", "images")}
            if found != {"schema": SCHEMA, "seed": seed, "images": counts}:
                raise DataError(f"{folder} holds OV-Shapes of {found}, not of seed {seed} with {counts}: {_REDO}.")
            if _has_files(folder, ANNOTATION_FILES):
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
    # A complete folder may be read-only: not even a lock is written.
    if not _has_files(manifest_file.parent, ANNOTATION_FILES):
        ensure_generated(root, manifest["seed"], manifest["images"])


def ensure_test(root: str | Path, count: int | None = None, workers: int = 2) -> dict[str, Any]:
    """Draw the test split below ``root`` unless it exists; the training and validation images before it, if needed.

    It has the seed of the data set that is there, whose files do not change. Several processes may call it
    concurrently.

    Args:
        root: as of :func:`ensure_generated`.
        count: of the images; None for the benchmark's 1,000, or the number of an existing split.
        workers: as of :func:`ensure_generated`.

    Returns:
        The manifest of the test split, manifest_test.json.

    Raises:
        DataError: another version of ovdet2 generated the data set, or the test split is of another seed or size.
        SetupError: the folder lacks the test split and cannot be written.
        UsageError: a count below 1.
    """
    if count is not None and count < 1:
        raise UsageError(f"the test split of OV-Shapes needs at least one image, not {count}.")
    ensure_current(root)
    folder = Path(root) / FOLDER
    seed = _read_manifest(folder / "manifest.json")["seed"]
    manifest = _existing_test(folder, seed, count)
    if manifest is None:
        with _locked(folder):
            manifest = _existing_test(folder, seed, count) or _draw_test(folder, seed, count or TEST_COUNT, workers)
    return manifest


def _existing_test(folder, seed, count):
    """The manifest of a complete test split; None if it is not there.

    Raises:
        DataError: it is of another version, seed or size.
    """
    path = folder / "manifest_test.json"
    if not path.is_file():
        return None
    manifest = _read_manifest(path, _TEST_FORM, _REDO_TEST)
    expected = {"schema": SCHEMA, "seed": seed} | ({"images": {TEST_SPLIT: count}} if count else {})
    recorded = {key: manifest.get(key) for key in expected}
    if recorded != expected:
        raise DataError(f"{path} is of the test split {recorded}, not of {expected}: {_REDO_TEST}.")
    return manifest if _has_files(folder, TEST_ANNOTATION_FILES) else None


def _draw_test(folder, seed, count, workers):
    annotations = folder / "annotations"
    (folder / "manifest_test.json").unlink(missing_ok=True)
    truth, masks, pixels = _draw(folder, seed, TEST_SPLIT, count, workers)
    source = annotations / f"instances_{TEST_SPLIT}.json"
    prepare_file(source, annotations / "ov_shapes_test.json", OV_SHAPES, OV_SHAPES.category_ids, _REDO_TEST)
    _write_lvis(annotations, TEST_SPLIT, truth, masks, read_json(annotations / "instances_train2017.json", _REDO))
    manifest = _manifest(seed, {TEST_SPLIT: count}, {TEST_SPLIT: truth}, {TEST_SPLIT: pixels})
    write_json(folder / "manifest_test.json", manifest, indent=1)
    return manifest


@contextlib.contextmanager
def _locked(folder):
    """Hold the lock of the data set; it also shows whether the folder can be written.

    Raises:
        SetupError: it cannot.
    """
    try:
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise SetupError(
            f"{folder} lacks files of OV-Shapes and cannot be written ({error.strerror}): run ovdet2 dataset prepare "
            "ov-shapes --test where it can be, or point DETECTRON2_DATASETS to a folder that can."
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_manifest(path, form=_FORM, remedy=_REDO):
    """The manifest of this or of another version.

    Raises:
        DataError: it is damaged.
    """
    manifest = read_json(path, remedy)
    current = isinstance(manifest, dict) and manifest.get("schema") == SCHEMA
    fault = fault_of(manifest, form if current else {"schema": str})
    if fault:
        raise DataError(f"{path} is damaged ({fault}): {remedy}.")
    return manifest


def _has_files(folder, names):
    return all((folder / "annotations" / name).is_file() for name in names)


def _generate(folder, seed, counts, workers):
    annotations = folder / "annotations"
    (folder / "manifest.json").unlink(missing_ok=True)
    truth, masks, pixel_hashes = {}, {}, {}
    for split, count in counts.items():
        truth[split], masks[split], pixel_hashes[split] = _draw(folder, seed, split, count, workers)
    for _ in prepare_split(annotations, FOLDER, OV_SHAPES, remedy=_REDO):
        pass
    for split in counts:
        _write_lvis(annotations, split, truth[split], masks[split], truth["train2017"])
    prepare_lvis_train(annotations / "lvis_v1_train.json", annotations / "ov_lvis_train_base.json", _REDO)
    manifest = _manifest(seed, counts, truth, pixel_hashes)
    write_json(folder / "manifest.json", manifest, indent=1)
    return manifest


def _draw(folder, seed, split, count, workers):
    """Draw a split and write its images and instances_<split>.json; returns (COCO json, masks, hash of the pixels)."""
    (folder / split).mkdir(exist_ok=True)
    data, pixels, masks = draw_split(seed, split, count, OV_SHAPES.category_ids, workers, folder / split)
    write_json(folder / "annotations" / f"instances_{split}.json", data)
    return data, masks, pixels


def _write_lvis(annotations, split, data, masks, train):
    novel_ids = {category_id for category_id, _ in OV_SHAPES.novel}
    lvis = lvis_json(data, masks, train, novel_ids, split)
    write_json(annotations / f"lvis_v1_{split.removesuffix('2017')}.json", lvis)


def _manifest(seed, counts, truth, pixel_hashes):
    """The manifest of drawn splits. Says so if they should be the benchmark's and are not."""
    manifest = {
        "schema": SCHEMA,
        "seed": seed,
        "images": counts,
        "annotations": {split: len(data["annotations"]) for split, data in truth.items()},
        "classes": {"base": len(BASE_NAMES), "all": len(CLASS_NAMES)},
        "pixels_sha256": pixel_hashes,
        "annotations_sha256": {split: annotations_hash(data) for split, data in truth.items()},
    }
    benchmark = read_json(HASHES)
    for split, count in counts.items():
        if (seed, count) != (benchmark["seed"], benchmark["images"][split]):
            continue
        if any(manifest[key][split] != benchmark[key][split] for key in ("pixels_sha256", "annotations_sha256")):
            logger.warning(
                "%s of OV-Shapes differs from the benchmark's, as numpy %s or Pillow %s draws other pixels than the "
                "versions of constraints.txt: figures are not comparable with published ones.",
                split, np.__version__, PIL.__version__,
            )  # fmt: skip
    return manifest


def _prepare() -> None:
    ensure_current(data_root())


def _prepare_test() -> None:
    ensure_test(data_root())


for _name, _images, _base_only in (("train_base", "train2017", True), ("val_all", "val2017", False)):
    register_dataset(
        f"ov_shapes_{_name}",
        f"ov_shapes/annotations/ov_shapes_{_name}.json",
        f"ov_shapes/{_images}",
        OV_SHAPES,
        prepare=_prepare,
        base_only=_base_only,
        remedy="run ovdet2 dataset prepare ov-shapes",
    )
register_dataset(
    "ov_shapes_test",
    "ov_shapes/annotations/ov_shapes_test.json",
    f"ov_shapes/{TEST_SPLIT}",
    OV_SHAPES,
    prepare=_prepare_test,
    validation_set="ov_shapes_val_all",
    remedy="run ovdet2 dataset prepare ov-shapes --test",
)

# The same images and annotations in LVIS format, with masks: the rare classes are novel.
for _name, _json, _needed, _base_only, _validation_set in (
    ("train_base", "ov_lvis_train_base", _prepare, True, ""),
    ("val", "lvis_v1_val", _prepare, False, ""),
    ("test", "lvis_v1_test", _prepare_test, False, "ov_shapes_lvis_val"),
):
    register_dataset(
        f"ov_shapes_lvis_{_name}",
        f"ov_shapes/annotations/{_json}.json",
        "ov_shapes",
        frequency_split,
        metric="ov_lvis",
        prepare=_needed,
        base_only=_base_only,
        masks=True,
        validation_set=_validation_set,
        remedy="run ovdet2 dataset prepare ov-shapes" + (" --test" if _validation_set else ""),
    )
