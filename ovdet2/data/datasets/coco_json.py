"""Data sets in the json format of COCO or LVIS with a base / novel split: filtering, checking and loading.

Files hold the category ids of the data set ("dataset category ids", sparse in COCO). Detectron2 records hold contiguous
ids, base classes first (0..B-1), then novel (B..K-1). The two are mapped by id, never by position.
"""

from __future__ import annotations

import logging
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pycocotools.mask as mask_api
from detectron2.structures import BoxMode

from ovdet2.data.datasets.validity import (
    FLAGS,
    MALFORMED,
    NEGATIVE,
    NO_AREA,
    NOT_EXHAUSTIVE,
    NOT_FINITE,
    NOT_NUMBERS,
    OTHER_LENGTH,
    OTHER_SIZE,
    OUTSIDE,
    as_id,
    box_fault,
    image_name,
    is_area,
    is_crowd,
    is_difficult,
    is_flag,
    is_id,
    leaves_folder,
    segmentation_fault,
    size_of,
)
from ovdet2.errors import DataError, UsageError, counted
from ovdet2.io.files import read_json
from ovdet2.io.images import image_size

logger = logging.getLogger(__name__)

_SHOWN = 5  # ids named in an error message
_LIMITED = reprlib.Repr()
_LIMITED.maxstring = 300  # a path
_BOX_FAULTS = {
    NOT_NUMBERS: "boxes that are not four numbers",
    NOT_FINITE: "boxes with a value that is not finite",
    NO_AREA: "boxes of zero or negative size",
    OUTSIDE: "boxes outside of their image",
}
_MASK_FAULTS = {
    MALFORMED: "masks that are missing or malformed",
    OTHER_SIZE: "masks of another size than their image",
    OTHER_LENGTH: "masks whose run lengths do not add up to their image",
}


@dataclass(frozen=True)
class Split:
    """A base / novel split: the classes a detector is trained on, and the classes that only appear at test time.

    Args:
        name: name in reports, such as "OV-COCO 48/17".
        base: ((dataset category id, class name), ...) in the order of the contiguous ids 0..B-1.
        novel: the same for B..K-1; may be empty.
        groups: extra rows of the report: {row name: dataset category ids}.

    A split without base classes is a transfer target: detectors are tested on it, but not trained.

    Raises:
        UsageError: no class, a repeated id or name, or a group with an id that is not in the split.
    """

    name: str
    base: tuple[tuple[int, str], ...]
    novel: tuple[tuple[int, str], ...] = ()
    groups: Mapping[str, Sequence[int]] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not self.category_ids:
            raise UsageError(f"split {self.name!r} has no class: give at least one (category id, name) pair.")
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
    def category_ids(self) -> tuple[int, ...]:
        """K dataset category ids, base first."""
        return tuple(category_id for category_id, _ in (*self.base, *self.novel))

    @property
    def names(self) -> tuple[str, ...]:
        """K class names, base first."""
        return tuple(name for _, name in (*self.base, *self.novel))

    @property
    def base_mask(self) -> tuple[bool, ...]:
        """K flags, True for base."""
        return (True,) * len(self.base) + (False,) * len(self.novel)

    @property
    def id_to_contiguous(self) -> dict[int, int]:
        """{dataset category id: contiguous id 0..K-1}."""
        return {category_id: index for index, category_id in enumerate(self.category_ids)}


def filter_coco_json(
    data: Mapping[str, Any],
    category_ids: Iterable[int],
    keep_images: str = "annotated",
    source: str | Path = "the annotation json",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Filter a COCO json to some categories, their annotations (crowds included), and the images that have one.

    All OV-COCO files in use come from this procedure (OVR-CNN, Zareian et al. 2021). The input is not changed.

    Args:
        data: parsed COCO json.
        category_ids: dataset category ids to keep.
        keep_images: "annotated" drops images without a kept annotation, "all" keeps them.
        source: name of the json in error messages, such as its path.

    Returns:
        (filtered, report): the new json (records shared with ``data``), and a dict of the counts "images",
        "annotations", "crowds", "categories" of the new json, "images_read", "annotations_read", and "degenerate", the
        ids of annotations that are dropped because their box has no area (official COCO train has two).

    Raises:
        DataError: a category is not among data["categories"], or the json lacks its three lists.
        UsageError: unknown ``keep_images``.
    """
    if keep_images not in ("annotated", "all"):
        raise UsageError(f"keep_images is {keep_images!r}: give 'annotated' or 'all'.")
    require_lists(data, source)
    require_ids(data, source)
    wanted = set(category_ids)
    categories = [category for category in data["categories"] if category.get("id") in wanted]
    absent = wanted - {category["id"] for category in categories}
    if absent:
        raise DataError(
            f"{source} has no category {first_few(sorted(absent))}: "
            "use a file with the original category ids of the data set (not renumbered for another code base)."
        )
    of_wanted = [annotation for annotation in data["annotations"] if annotation.get("category_id") in wanted]
    annotations = [annotation for annotation in of_wanted if box_fault(annotation.get("bbox")) != NO_AREA]
    degenerate = [annotation.get("id") for annotation in of_wanted if box_fault(annotation.get("bbox")) == NO_AREA]
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


def load_ov_json(
    json_file: str | Path,
    image_root: str | Path,
    split: Split,
    base_only: bool = False,
    masks: bool = False,
    federated: bool = False,
) -> list[dict[str, Any]]:
    """Read a COCO or LVIS json as Detectron2's standard dataset dicts, after checking every record.

    Detectron2's readers are not used: they would parse the file a second time after the checks.

    Args:
        json_file: annotation file.
        image_root: folder the "file_name" entries are relative to; may be a symbolic link.
        split: that its category ids belong to.
        base_only: refuse labels of novel classes (training data).
        masks: load the segmentations too, and refuse a box without one.
        federated: the json is in LVIS format. If an image has "coco_url", its last two parts replace "file_name", see
            :func:`~ovdet2.data.datasets.validity.image_name`. The image's "neg_category_ids" and
            "not_exhaustive_category_ids" are loaded.

    Returns:
        Records by ascending image id: file_name, height, width, image_id, with ``federated`` the two lists of
        dataset category ids, and annotations with id, bbox (x, y, width, height in pixels), bbox_mode, area (square
        pixels; of the mask if the file states it, else of the box), iscrowd (also 1 for an object with ``ignore: 1``,
        which has "difficult" besides), the contiguous, base-first category_id, and with ``masks`` the segmentation:
        polygons, or a run-length code.

    Raises:
        DataError: missing or damaged file; no images; an image without id or file name, or listed twice; an image
            without width and height whose file cannot be read either; a file name outside of ``image_root``; an
            annotation listed twice, of an unknown image or category, of a novel class despite ``base_only``, or whose
            box is not four finite numbers, has no area, or lies outside of its image; a mask that is missing or not of
            COCO's form; a federated list that is missing or names a novel class despite ``base_only``; a category whose
            name differs from the split.
    """
    return records_of(read_coco_json(json_file), json_file, image_root, split, base_only, masks, federated)


def read_coco_json(
    path: str | Path, remedy: str = "check the path, or prepare the data set as datasets/README.md describes"
) -> dict[str, Any]:
    """Parse a json with COCO's three lists; DataError if the file is missing, damaged or of another format."""
    data = read_json(path, remedy)
    require_lists(data, path)
    return data


def records_of(
    data: Mapping[str, Any],
    json_file: str | Path,
    image_root: str | Path,
    split: Split,
    base_only: bool = False,
    masks: bool = False,
    federated: bool = False,
) -> list[dict[str, Any]]:
    """:func:`load_ov_json` of a json that is parsed already; ``json_file`` is its name in messages."""
    faults = _Faults(json_file)
    contiguous: dict[int | None, int] = {**split.id_to_contiguous}  # looked up with None for what is no id
    for category in data["categories"]:
        position = contiguous.get(as_id(category.get("id")))
        if position is not None and category.get("name") != split.names[position]:
            faults.add(
                f"categories not named as in the split {split.name}, id",
                f"{category['id']} ({category.get('name')!r} for {split.names[position]!r})",
                "use a file with the original category ids of the data set, or a Split with its names",
            )
    if not data["images"]:
        raise DataError(f"{json_file} has no images: check that it is the right file and was filtered as intended.")
    records = _image_records(data["images"], str(image_root), federated, faults)
    if federated:
        novel = {category_id for category_id, _ in split.novel} if base_only else set()
        _attach_federated_lists(data["images"], records, novel, faults)
    _attach_annotations(data["annotations"], records, split, base_only, masks, faults)
    faults.raise_if_any()
    return [records[image_id] for image_id in sorted(records)]


def require_lists(data: Any, source: str | Path) -> None:
    """Raise a :class:`~ovdet2.errors.DataError` that names ``source`` unless ``data`` has COCO's three lists."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{source} has no list {key!r}: it is not a COCO instances json; check the file.")
        if not all(isinstance(record, dict) for record in data[key]):
            raise DataError(f"{source} has entries of {key!r} that are not objects: check the file.")


def require_ids(data: Mapping[str, Any], source: str | Path) -> None:
    """Raise a :class:`~ovdet2.errors.DataError` unless all ids, and references to them, are 64-bit integers."""
    for key, fields in (
        ("categories", ("id",)),
        ("images", ("id",)),
        ("annotations", ("id", "image_id", "category_id")),
    ):
        for field_name in fields:
            odd = [record.get(field_name) for record in data[key] if not is_id(record.get(field_name))]
            if odd:
                raise DataError(
                    f"{source} has {counted(len(odd), 'record')} of {key!r} whose {field_name} is not a 64-bit integer, "
                    f"such as {first_few(odd)}: ids as text are converted by ovdet2 dataset repair."
                )


def _image_records(images, image_root, federated, faults):
    """Dict of image id to Detectron2 record without annotations; faults are collected."""
    records, unsized = {}, []
    for image in images:
        image_id, name = as_id(image.get("id")), image_name(image, federated)
        if image_id is None:
            faults.add(
                "images without an integer id, file name", repr(name), "give each image its own integer id (64 bits)"
            )
            continue
        if image_id in records:
            faults.add("images listed twice, id", image_id, "keep one record of each")
        if name is None:
            faults.add("images without file_name, id", image_id, "add it to the json")
            continue
        if leaves_folder(name):
            faults.add(
                "file names outside of the image folder, image id", f"{image_id} ({name!r})", "make them relative to it"
            )
        path, size = os.path.join(image_root, name), size_of(image)
        if size is None and not leaves_folder(name):
            unsized.append(image_id)
            size = _size_of_file(path)
        if size is None:
            remedy = "add them to the json, or put the image files in place, from which they are read"
            faults.add("images without positive width and height, id", image_id, remedy)
        width, height = size or (0, 0)
        records[image_id] = {
            "file_name": path,
            "height": height,
            "width": width,
            "image_id": image_id,
            "annotations": [],
        }
    if unsized:
        logger.warning(
            "%s without a valid width and height (id %s): their sizes were read from the image files.",
            counted(len(unsized), "image"),
            first_few(unsized),
        )
    return records


def _size_of_file(path):
    """(width, height) of an image file, or None if it cannot be read."""
    try:
        return image_size(path)
    except (DataError, OSError, ValueError):  # ValueError: a name with a null character
        return None


def _attach_federated_lists(images, records, novel, faults):
    """Copy LVIS's two lists of category ids to the records; ``novel`` ids among the negatives are faults."""
    for image in images:
        record = records.get(as_id(image.get("id")))
        if record is None:
            continue
        for key in (NEGATIVE, NOT_EXHAUSTIVE):
            ids = image.get(key)
            if not isinstance(ids, list) or any(as_id(category_id) is None for category_id in ids):
                faults.add(f"images without a list of integers {key}, id", image["id"], "use a json of LVIS")
                continue
            record[key] = ids
        if novel.intersection(record.get(NEGATIVE, ())):
            faults.add(
                "images with novel classes among neg_category_ids in training data, id",
                image["id"],
                "make the file with ovdet2 dataset prepare ov-lvis",
            )


def _attach_annotations(annotations, records, split, base_only, masks, faults):
    """Append checked annotations to their records."""
    contiguous, base_count, seen = split.id_to_contiguous, len(split.base), set()
    for annotation in annotations:
        annotation_id, image_id = as_id(annotation.get("id")), as_id(annotation.get("image_id"))
        if annotation_id is None or annotation_id in seen:
            faults.add(
                "annotations without an integer id or with a repeated one, id",
                _LIMITED.repr(annotation.get("id")),
                "give each its own id",
            )
        seen.add(annotation_id)
        if image_id not in records:
            faults.add(
                "annotations of an image that is not in the file, id",
                annotation_id,
                _remedy(annotation, "image_id", "add it or drop them"),
            )
            continue
        category = contiguous.get(as_id(annotation.get("category_id")))
        if category is None:
            faults.add(
                f"annotations of a category outside of the split {split.name}, id",
                f"{annotation_id} (category {_LIMITED.repr(annotation.get('category_id'))})",
                _remedy(annotation, "category_id", "filter the json (datasets/README.md)"),
            )
            continue
        if base_only and category >= base_count:
            faults.add("annotations of novel classes in training data, id", annotation_id, "keep base classes only")
        record, box = records[image_id], annotation.get("bbox")
        size = (record["width"], record["height"]) if record["width"] else None  # no size: reported with the image
        fault = box_fault(box, size)
        if fault:
            faults.add(f"{_BOX_FAULTS[fault]}, annotation id", annotation_id, "drop them (ovdet2 dataset repair)")
        for key in FLAGS:
            if not is_flag(annotation.get(key, 0)):
                faults.add(f"annotations whose {key} is neither 0 nor 1, id", annotation_id, "repair or drop them")
        area = annotation.get("area")
        record["annotations"].append(
            {
                "id": annotation_id,
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "area": area if fault or is_area(area) else float(box[2] * box[3]),
                "category_id": category,
                "iscrowd": int(is_crowd(annotation)),
            }
        )
        if is_difficult(annotation):
            record["annotations"][-1]["difficult"] = True
        if masks:
            segmentation = annotation.get("segmentation")
            fault = segmentation_fault(segmentation, size)
            if fault:
                faults.add(f"{_MASK_FAULTS[fault]}, annotation id", annotation_id, "repair or drop them")
            elif isinstance(segmentation, dict):
                segmentation = compressed(segmentation)
            record["annotations"][-1]["segmentation"] = segmentation


def _remedy(annotation, key, remedy):
    return (
        "convert ids given as text or fractions (ovdet2 dataset repair)"
        if type(annotation.get(key)) in (str, float)
        else remedy
    )


def compressed(code: dict[str, Any]) -> dict[str, Any]:
    """A valid run-length code with its counts as a string, as Detectron2's mapper and COCO's tools require."""
    height, width = map(int, code["size"])
    if isinstance(code["counts"], str):
        return {**code, "size": [height, width]}
    encoded = mask_api.frPyObjects(cast(Any, {**code, "size": [height, width]}), height, width)
    return {**encoded, "counts": encoded["counts"].decode("ascii")}  # for a dict it returns a dict, counts as bytes


def first_few(values: Sequence[object]) -> str:
    """The first five values for an error message, as repr, which shows their type; dots follow if there are more."""
    return first_texts([_LIMITED.repr(value) for value in values[: _SHOWN + 1]])


def first_texts(texts: Sequence[str]) -> str:
    """As :func:`first_few`, of texts that describe values."""
    return ", ".join(texts[:_SHOWN]) + (", ..." if len(texts) > _SHOWN else "")


class _Faults:
    """Collects faults by kind, so that one error names all faults of a file."""

    def __init__(self, source):
        self._source = source
        self._found = {}  # (kind, remedy) -> offenders

    def add(self, kind, offender, remedy):
        """``offender``: its id, or a text that describes it."""
        described = offender if isinstance(offender, str) else _LIMITED.repr(offender)
        self._found.setdefault((kind, remedy), []).append(described)

    def raise_if_any(self):
        if self._found:
            raise DataError(
                f"{self._source}: "
                + " ".join(
                    f"{len(offenders)} {kind} {first_texts(offenders)}: {remedy}."
                    for (kind, remedy), offenders in self._found.items()
                )
            )
