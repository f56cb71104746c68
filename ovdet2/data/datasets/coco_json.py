"""Data sets in COCO's json format with a base / novel split: filtering, validated loading, registration.

Category ids in files are the data set's own ("dataset category ids", sparse in COCO). Detectron2 records carry
contiguous ids, base classes first (0..B-1), then novel (B..K-1); the two are mapped by id, never by position.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ovdet2.errors import DataError, UsageError
from ovdet2.files import read_json

_SHOWN = 5  # ids named in an error message
_NO_AREA = "boxes of zero or negative size"


@dataclass(frozen=True)
class Split:
    """Which classes a detector is trained on and which only appear at test time.

    Args:
        name: what reports call it, such as "OV-COCO 48/17".
        base: ((dataset category id, class name), ...) in the order of the contiguous ids 0..B-1.
        novel: the same for B..K-1; may be empty.
        groups: extra rows of the report: {row name: dataset category ids}.

    Raises:
        UsageError: no base class, an id or a name given twice, or a group with an id that is not in the split.
    """

    name: str
    base: tuple
    novel: tuple = ()
    groups: dict = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not self.base:
            raise UsageError(f"split {self.name!r} has no base class: give at least one (category id, name) pair.")
        for kind, values in (("category id", self.category_ids), ("class name", self.names)):
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise UsageError(f"split {self.name!r} has the {kind} {', '.join(twice)} twice: keep one of them.")
        for group, ids in self.groups.items():
            unknown = set(ids) - set(self.category_ids)
            if unknown:
                raise UsageError(
                    f"group {group!r} of split {self.name!r} names the category ids {sorted(unknown)}, "
                    "which are neither base nor novel: remove them."
                )

    @property
    def category_ids(self):
        """Tuple of K dataset category ids, base first."""
        return tuple(category_id for category_id, _ in (*self.base, *self.novel))

    @property
    def names(self):
        """Tuple of K class names, base first."""
        return tuple(name for _, name in (*self.base, *self.novel))

    @property
    def base_mask(self):
        """Tuple of K booleans, True for base."""
        return (True,) * len(self.base) + (False,) * len(self.novel)

    @property
    def id_to_contiguous(self):
        """Dict of dataset category id to contiguous id 0..K-1."""
        return {category_id: index for index, category_id in enumerate(self.category_ids)}


def data_root():
    """The folder of all data sets: $DETECTRON2_DATASETS, or ``datasets`` below the working folder."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def filter_coco_json(data, category_ids, keep_images="annotated", source="the annotation json"):
    """Keep some categories, their annotations (crowds included), and the images that have one.

    This is the procedure all OV-COCO files in use go back to (OVR-CNN, Zareian et al. 2021). The input is not changed.

    Args:
        data: parsed COCO json.
        category_ids: dataset category ids to keep.
        keep_images: "annotated" drops images without a kept annotation, "all" keeps them.
        source: what error messages call the json, such as its path.

    Returns:
        (filtered, report): the new json (records shared with ``data``), and a dict with "images", "annotations",
        "crowds", "categories" (counts kept), "images_read", "annotations_read" and "degenerate", the ids of
        annotations dropped because their box has no area (official COCO train has two).

    Raises:
        DataError: a wanted category is not among data["categories"], or the json lacks its three lists.
        UsageError: another ``keep_images``.
    """
    if keep_images not in ("annotated", "all"):
        raise UsageError(f"keep_images is {keep_images!r}: give 'annotated' or 'all'.")
    require_lists(data, source)
    wanted = set(category_ids)
    categories = [category for category in data["categories"] if category.get("id") in wanted]
    absent = wanted - {category["id"] for category in categories}
    if absent:
        raise DataError(
            f"{source} has no category {first_few(sorted(absent))}: "
            "use a file with the data set's own category ids (not one re-numbered for another code base)."
        )
    of_wanted = [annotation for annotation in data["annotations"] if annotation.get("category_id") in wanted]
    annotations = [annotation for annotation in of_wanted if _box_fault(annotation.get("bbox")) != _NO_AREA]
    degenerate = [annotation.get("id") for annotation in of_wanted if _box_fault(annotation.get("bbox")) == _NO_AREA]
    annotated = {annotation.get("image_id") for annotation in annotations}
    images = [image for image in data["images"] if keep_images == "all" or image.get("id") in annotated]
    filtered = {**data, "images": images, "annotations": annotations, "categories": categories}
    report = {
        "images": len(images),
        "annotations": len(annotations),
        "crowds": sum(bool(annotation.get("iscrowd", 0)) for annotation in annotations),
        "categories": len(categories),
        "images_read": len(data["images"]),
        "annotations_read": len(data["annotations"]),
        "degenerate": degenerate,
    }
    return filtered, report


def load_ov_json(json_file, image_root, split, base_only=False):
    """Read a COCO json as Detectron2's standard dataset dicts, after checking every record.

    The boxes alone are taken (no masks). The file is parsed once, which is why Detectron2's own reader, that would
    parse it again after the checks, is not called.

    Args:
        json_file: annotation file.
        image_root: folder the "file_name" entries are relative to; may be a symbolic link.
        split: the :class:`Split` its category ids belong to.
        base_only: refuse annotations of novel classes (training data).

    Returns:
        list of dicts by ascending image id: file_name, height, width, image_id, and annotations with bbox
        (x, y, width, height in pixels), bbox_mode, iscrowd and the contiguous, base-first category_id.

    Raises:
        DataError: missing or damaged file; no images; an image without id, file name, width or height, or given
            twice; a file name that leaves ``image_root``; an annotation given twice, of an unknown image or category,
            of a novel class although ``base_only``, or whose box is not four finite numbers, has no area, or lies
            outside of its image; a category whose name is not the split's.
    """
    data = read_json(json_file, remedy="check the path, or prepare the data set as datasets/README.md says")
    require_lists(data, json_file)
    faults, contiguous = _Faults(json_file), split.id_to_contiguous
    for category in data["categories"]:
        position = contiguous.get(_integer(category.get("id")))
        if position is not None and category.get("name") != split.names[position]:
            faults.add(
                f"categories not named as in the split {split.name}, id",
                f"{category['id']} ({category.get('name')!r} for {split.names[position]!r})",
                "use a file with the data set's own category ids, or a Split with its names",
            )
    if not data["images"]:
        raise DataError(f"{json_file} has no images: check that it is the right file and was filtered as intended.")
    records = _image_records(data["images"], str(image_root), faults)
    _attach_annotations(data["annotations"], records, split, base_only, faults)
    faults.raise_if_any()
    return [records[image_id] for image_id in sorted(records)]


def register_ov_dataset(
    name, json_file, image_root, split, prepare=None, base_only=False, remedy="see datasets/README.md"
):
    """Register a data set under ``name`` in Detectron2's DatasetCatalog and MetadataCatalog. No file is read here.

    Metadata: thing_classes (K names, base first), thing_dataset_id_to_contiguous_id, evaluator_type "ov_coco",
    ov_split, ov_files (a callable giving (json path, image root) as they resolve now), and, once loaded,
    json_file and image_root.

    Args:
        name: name for DATASETS.TRAIN / DATASETS.TEST.
        json_file: path, or callable returning one; a relative path is below :func:`data_root` at the time of loading.
        image_root: the same for the folder of images.
        split: :class:`Split`.
        prepare: optional callable without arguments, called before each load: it makes what is absent and refuses what
            is out of date. Several processes may call it at once, so it does its own locking.
        base_only: refuse annotations of novel classes; give True for training data.
        remedy: what to do when the data set is missing, such as the command that makes it.

    Raises:
        UsageError: the name is taken.
    """
    if name in DatasetCatalog.list():
        raise UsageError(f"a data set named {name!r} is registered already: choose another name.")

    def files():
        return tuple(_resolve(path) for path in (json_file, image_root))

    def load():
        json_path, image_path = files()
        if prepare is not None:
            prepare()
        for path in (json_path, image_path):
            if not path.exists():
                raise DataError(f"data set {name}: {path} does not exist. Remedy: {remedy}.")
        # Written past Metadata's write-once rule: the data root may differ from one load to the next.
        MetadataCatalog.get(name).__dict__.update(json_file=str(json_path), image_root=str(image_path))
        return load_ov_json(json_path, image_path, split, base_only)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=list(split.names),
        thing_dataset_id_to_contiguous_id=split.id_to_contiguous,
        evaluator_type="ov_coco",
        ov_split=split,
        ov_files=files,
    )


def _resolve(path):
    return data_root() / (path() if callable(path) else path)


def require_lists(data, source):
    """Raise a :class:`~ovdet2.errors.DataError` that names ``source`` unless ``data`` has COCO's three lists."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{source} has no list {key!r}: it is not a COCO instances json; check the file.")
        if not all(isinstance(record, dict) for record in data[key]):
            raise DataError(f"{source} has entries of {key!r} that are not objects: check the file.")


def _image_records(images, image_root, faults):
    """Dict of image id to Detectron2 record without annotations; faults are collected."""
    records = {}
    for image in images:
        image_id, name = _integer(image.get("id")), image.get("file_name")
        if image_id is None:
            faults.add("images without an integer id, file name", name, "give each image its own integer id")
            continue
        if image_id in records:
            faults.add("images given twice, id", image_id, "keep one record of each")
        if not isinstance(name, str) or not name:
            faults.add("images without file_name, id", image_id, "add it to the json")
            continue
        if os.path.isabs(name) or ".." in Path(name).parts:
            faults.add("file names that leave the image folder, image id", f"{image_id} ({name})", "make them relative")
        height, width = image.get("height"), image.get("width")
        if not (_is_positive(height) and _is_positive(width)):
            faults.add("images without positive width and height, id", image_id, "add them to the json")
        records[image_id] = {
            "file_name": os.path.join(image_root, name),
            "height": height,
            "width": width,
            "image_id": image_id,
            "annotations": [],
        }
    return records


def _attach_annotations(annotations, records, split, base_only, faults):
    """Append checked annotations to their records."""
    contiguous, base_count, seen = split.id_to_contiguous, len(split.base), set()
    for annotation in annotations:
        annotation_id, image_id = _integer(annotation.get("id")), _integer(annotation.get("image_id"))
        if annotation_id is None or annotation_id in seen:
            faults.add(
                "annotations without an integer id or with one given twice, id",
                annotation.get("id"),
                "number them anew",
            )
        seen.add(annotation_id)
        if image_id not in records:
            faults.add("annotations of an image that is not in the file, id", annotation_id, "add it or drop them")
            continue
        category = contiguous.get(_integer(annotation.get("category_id")))
        if category is None:
            faults.add(
                f"annotations of a category outside of the split {split.name}, id",
                f"{annotation_id} (category {annotation.get('category_id')})",
                "filter the json (datasets/README.md)",
            )
            continue
        if base_only and category >= base_count:
            faults.add("annotations of novel classes in training data, id", annotation_id, "keep base classes only")
        record, box = records[image_id], annotation.get("bbox")
        fault = _box_fault(box) or _outside(box, record)
        if fault:
            faults.add(f"{fault}, annotation id", annotation_id, "mend or drop them")
        crowd = annotation.get("iscrowd", 0)
        if crowd not in (0, 1):
            faults.add("annotations whose iscrowd is neither 0 nor 1, id", annotation_id, "mend or drop them")
        record["annotations"].append(
            {
                "id": annotation_id,
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": category,
                "iscrowd": int(crowd == 1),
            }
        )


def _box_fault(box):
    """What is wrong with an (x, y, width, height) box, or None."""
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return "boxes that are not four numbers"
    if not all(_is_finite(value) for value in box):
        return "boxes with a value that is not finite"
    if box[2] <= 0 or box[3] <= 0:
        return _NO_AREA
    return None


def _outside(box, record):
    x, y, width, height = box
    if not (_is_positive(record["width"]) and _is_positive(record["height"])):
        return None  # reported with the image
    if x + width <= 0 or y + height <= 0 or x >= record["width"] or y >= record["height"]:
        return "boxes outside of their image"
    return None


def _is_positive(value):
    return _is_finite(value) and value > 0


def _is_finite(value):
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def _integer(value):
    """``value`` if it is an integer, otherwise None; a list as id cannot even be looked up, and True would be 1."""
    return value if type(value) is int else None


def first_few(values):
    """The first five of a list as text for an error message, with dots where there are more."""
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return shown + (", ..." if len(values) > _SHOWN else "")


class _Faults:
    """Collects faults by kind, so that one run of a loader names all that is wrong with a file."""

    def __init__(self, source):
        self._source = source
        self._found = {}  # (kind, remedy) -> offenders

    def add(self, kind, offender, remedy):
        self._found.setdefault((kind, remedy), []).append(offender)

    def raise_if_any(self):
        if self._found:
            raise DataError(
                f"{self._source}: "
                + " ".join(
                    f"{len(offenders)} {kind} {first_few(offenders)}: {remedy}."
                    for (kind, remedy), offenders in self._found.items()
                )
            )
