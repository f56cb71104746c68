"""Check a COCO- or LVIS-format json and its images: report every problem by kind and id.

The json is not trusted: any value may be of any type, and no file outside of the image root is opened.
:mod:`ovdet2.data.datasets.repair` repairs the problems that have only one possible repair.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from ovdet2.data.datasets.findings import (
    KINDS,
    LISTS,
    NEGATIVE,
    NOT_EXHAUSTIVE,
    NOTES,
    TOLERANCE,
    Finding,
    is_id,
    printable,
    show,
    show_field,
    usable_id,
)
from ovdet2.errors import DataError
from ovdet2.io.images import image_size, read_image
from ovdet2.io.progress import progress_bar

_NUMBERS = {int, float}  # by type, since a bool is an int
_ENOUGH = 10  # minimum number of boxes for a suspicion about the file
_FIT, _LEAVE = 0.9, 0.25  # shares of boxes, see _suspect_xyxy


def check(
    data: Any, source: str | Path, image_root: str | Path | None = None, decode: bool = False, workers: int = 1
) -> list[Finding]:
    """Check a json and, with ``image_root``, its image files.

    Args:
        data: parsed json; not changed.
        source: its path, for error messages.
        image_root: folder that the file names are relative to, or None to check no image file.
        decode: decode every image completely, which finds truncated ones; otherwise only headers are read.
        workers: processes that read images; the findings do not depend on their number.

    Returns:
        All findings, in the order of KINDS, then of the json.

    Raises:
        DataError: ``data`` is no object with the three lists of the format, or ``image_root`` is no folder.
    """
    found = check_json(data, source)
    if image_root is not None:
        found += check_images(data["images"], is_lvis(data), image_root, decode, workers)
    return sorted(found, key=_order)


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are problems: without the kinds of NOTES, which only inform."""
    return [finding for finding in findings if finding.kind not in NOTES]


def is_lvis(data: Mapping[str, Any]) -> bool:
    """Whether a json is in LVIS format: one of its images or categories has a field of that format."""
    return any(
        isinstance(record, dict) and not fields.isdisjoint(record)
        for key, fields in (("images", {NEGATIVE, NOT_EXHAUSTIVE}), ("categories", {"frequency"}))
        for record in data[key]
    )


def check_json(data: Any, source: str | Path) -> list[Finding]:
    """Check a json without its image files; arguments, result and errors as of :func:`check`."""
    for key in LISTS.values():
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{source} has no list {key!r}: it is not a COCO or LVIS instances json; check the file.")
    found, lvis = [], is_lvis(data)
    category_ids = _check_categories(data["categories"], lvis, found)
    images = _check_image_records(data["images"], category_ids, lvis, found)
    if not images or not category_ids:
        found.append(Finding("file-empty", None, None, f"{len(images)} images, {len(category_ids)} categories"))
    annotated = _check_annotations(data["annotations"], images, category_ids, found)
    for image_id, image in images.items():
        if image_id not in annotated:
            found.append(Finding("image-without-annotations", image_id, image.index, ""))
    return sorted(found, key=_order)


def image_name(image: Mapping[str, Any], lvis: bool) -> str | None:
    """Path of an image below the image root, or None if its record does not state it.

    The path is "file_name". In LVIS it is the last two parts of "coco_url" if that is given
    ("train2017/000000000009.jpg"), as Detectron2 reads LVIS.
    """
    name, url = image.get("file_name"), image.get("coco_url")
    if lvis and isinstance(url, str) and url:
        return "/".join(url.split("/")[-2:])
    return name if isinstance(name, str) and name else None


def check_images(
    records: Sequence[Any], lvis: bool, image_root: str | Path, decode: bool = False, workers: int = 1
) -> list[Finding]:
    """Compare the image files with their records.

    Args:
        records: the json's "images".
        lvis: whether they are named as in LVIS, see :func:`image_name`.
        image_root, decode, workers: as of :func:`check`.

    Returns:
        In the order of ``records``.

    Raises:
        DataError: ``image_root`` is no folder.
    """
    if not os.path.isdir(image_root):
        raise DataError(f"{image_root} is not a folder: give the folder that the file names are relative to.")
    root = os.path.realpath(image_root)
    named = [(index, image) for index, image in enumerate(records) if isinstance(image, dict)]
    named = [(index, image) for index, image in named if _name_fault(image, lvis) is None]
    jobs = [(root, image_name(image, lvis), _size_of(image), decode) for _, image in named]
    found = []
    with contextlib.ExitStack() as stack:
        run = map
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("fork")))
            run = functools.partial(pool.map, chunksize=32)
        faults = progress_bar(run(_file_fault, jobs), total=len(jobs), desc="reading images", unit="image", leave=False)
        for (index, image), fault in zip(named, faults):
            if fault is not None:
                found.append(_finding(fault[0], index, image, fault[1]))
    return found


def _file_fault(job):
    """(kind, detail) of what is wrong with an image file, or None. ``job``: real root, name, (W, H) or None, decode."""
    root, name, size, decode = job
    try:
        path = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, path]) != root:
            return (
                "image-escape",
                f"{show(name)} is a link to a file outside of the image folder: copy the file, or name its real folder",
            )
        if not os.path.isfile(path):
            return "image-missing", show(name)
        height, width = read_image(path).shape[:2] if decode else image_size(path)[::-1]
    except DataError as error:
        return "image-unreadable", printable(str(error))
    except (OSError, ValueError) as error:  # an invalid file name: too long, or with a null character
        return "image-missing", printable(f"{show(name)}: {error}")
    if size is not None and (width, height) != size:
        return "image-mismatch", f"the file is {width}x{height} (upright), the json states {size[0]}x{size[1]}"
    return None


def _identified(records, of, found):
    """Yield (index, record, id or None) of the records that are objects; report other records and faulty ids."""
    first = {}
    for index, record in enumerate(progress_bar(records, desc=f"checking {LISTS[of]}", unit=of, leave=False, delay=1)):
        if not isinstance(record, dict):
            found.append(Finding(f"{of}-record", None, index, show(record)))
            continue
        record_id = usable_id(record)
        if record_id is None:
            found.append(Finding(f"{of}-id", None, index, show_field(record, "id")))
        else:
            earlier = first.setdefault(record_id, index)
            if earlier != index:
                kind = "copy" if records[earlier] == record else "conflict"
                found.append(Finding(f"{of}-{kind}", record_id, index, f"number {index} and {earlier} of the list"))
        yield index, record, record_id


def _check_categories(records, lvis, found):
    """The set of category ids."""
    category_ids = set()
    for index, category, category_id in _identified(records, "category", found):
        if category_id is not None:
            category_ids.add(category_id)
        if not isinstance(category.get("name"), str) or not category["name"]:
            found.append(_finding("category-name", index, category, show_field(category, "name")))
        if lvis and category.get("frequency") not in ("r", "c", "f"):
            found.append(_finding("category-frequency", index, category, show_field(category, "frequency")))
    return category_ids


class _Image(NamedTuple):
    index: int
    size: tuple | None  # (width, height)
    negatives: frozenset  # category ids


def _check_image_records(records, category_ids, lvis, found):
    """Dict of image id to :class:`_Image`; of several images with one id, the first."""
    images = {}
    for index, image, image_id in _identified(records, "image", found):
        size = _size_of(image)
        if size is None:
            seen = f"{show_field(image, 'width')}, {show_field(image, 'height')}"
            found.append(_finding("image-size", index, image, seen))
        fault = _name_fault(image, lvis)
        if fault is not None:
            found.append(_finding(fault[0], index, image, fault[1]))
        negatives = _check_federated(index, image, category_ids, found) if lvis else frozenset()
        if image_id is not None:
            images.setdefault(image_id, _Image(index, size, negatives))
    return images


def _name_fault(image, lvis):
    name = image_name(image, lvis)
    if name is None:
        return "image-name", show_field(image, "file_name")
    for given in (name, image.get("file_name")):  # in LVIS "coco_url" has precedence, but other readers use file_name
        if isinstance(given, str) and (os.path.isabs(given) or ".." in Path(given).parts):
            return "image-escape", show(given)
    return None


def _check_federated(index, image, category_ids, found):
    """The image's negative category ids.

    A not-exhaustive class without a box is no fault: a training file without the boxes of rare classes keeps the list.
    """
    listed = {}
    for key in (NEGATIVE, NOT_EXHAUSTIVE):
        ids = image.get(key)
        if not isinstance(ids, list):
            found.append(_finding("federated-missing", index, image, show_field(image, key)))
            ids = []
        unknown = [value for value in ids if not (is_id(value) and value in category_ids)]
        if unknown:
            found.append(_finding("federated-unknown", index, image, f"{key}: {show(unknown)}"))
        listed[key] = frozenset(value for value in ids if is_id(value))
    both = listed[NEGATIVE] & listed[NOT_EXHAUSTIVE]
    if both:
        found.append(_finding("federated-both", index, image, show(sorted(both))))
    return listed[NEGATIVE]


def _check_annotations(records, images, category_ids, found):
    """Ids of the images that have annotations, a set."""
    annotated, used = set(), Counter()
    boxed, rows = array("q"), array("d")  # indices; and x, y, width, height, image width, image height per index
    for index, annotation, annotation_id in _identified(records, "annotation", found):
        image_id, category_id, box = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
        image = None
        if not is_id(image_id):
            found.append(_finding("annotation-field", index, annotation, show_field(annotation, "image_id")))
        elif image_id not in images:
            found.append(_finding("image-unknown", index, annotation, show_field(annotation, "image_id")))
        else:
            image = images[image_id]
            annotated.add(image_id)
        if not is_id(category_id):
            found.append(_finding("annotation-field", index, annotation, show_field(annotation, "category_id")))
        else:
            used[category_id] += 1
            if category_id not in category_ids:
                found.append(_finding("category-unknown", index, annotation, show_field(annotation, "category_id")))
            elif image is not None and category_id in image.negatives:
                seen = f"category {category_id}, of annotation {annotation_id}"
                found.append(Finding("federated-negative", image_id, image.index, seen))
        size = image.size if image is not None and image.size is not None else (math.inf, math.inf)
        if not isinstance(box, list) or len(box) != 4 or not _NUMBERS.issuperset(map(type, box)):
            found.append(_finding("annotation-field", index, annotation, show_field(annotation, "bbox")))
        elif not _all_finite(box):
            found.append(_finding("box-not-finite", index, annotation, show(box)))
        else:
            boxed.append(index)
            rows.extend((*box, *size))
        for kind, seen in _other_faults(annotation, size):
            found.append(_finding(kind, index, annotation, seen))
    _check_boxes(records, np.array(boxed), np.array(rows).reshape(-1, 6), found)
    _suspect_shift(used, category_ids, found)
    return annotated


def _other_faults(annotation, size):
    """Yield (kind, detail) of faults of the optional fields iscrowd, area and segmentation."""
    if annotation.get("iscrowd", 0) not in (0, 1):
        yield "annotation-field", show_field(annotation, "iscrowd")
    if "area" in annotation:
        area = annotation["area"]
        if type(area) not in _NUMBERS or not _all_finite([area]) or area <= 0:
            yield "area", show_field(annotation, "area")
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list):
        bad = [position for position, polygon in enumerate(segmentation) if not is_polygon(polygon)]
        if bad:
            kind = "polygon" if len(bad) < len(segmentation) else "segmentation"
            yield kind, f"{len(bad)} of {len(segmentation)} polygons, the first is {show(segmentation[bad[0]])}"
    elif isinstance(segmentation, dict):
        has_counts = isinstance(segmentation.get("counts"), (str, list))
        if not has_counts or (size[0] < math.inf and segmentation.get("size") != [size[1], size[0]]):
            yield "segmentation", f"{show(segmentation)} in an image of {size[0]:g}x{size[1]:g}"
    elif segmentation is not None:
        yield "segmentation", show(segmentation)


def is_polygon(polygon: object) -> TypeGuard[list[float]]:
    """Whether a value is a list [x1, y1, x2, y2, ...] of at least 3 points, all finite numbers."""
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and _NUMBERS.issuperset(map(type, polygon))
        and _all_finite(polygon)
    )


def _check_boxes(records, indices, rows, found):
    """Report empty boxes and boxes outside of their image.

    Args:
        indices: array [M], into ``records``, of the annotations with finite boxes.
        rows: array [M, 6]: x, y, width, height in pixels, and the image's width and height, infinite if unknown.
    """
    x, y, width, height, image_width, image_height = rows.T
    with np.errstate(over="ignore"):  # a sum that overflows is outside too
        right, bottom = x + width, y + height
    empty = (width <= 0) | (height <= 0)
    outside = ~empty & ((right <= 0) | (bottom <= 0) | (x >= image_width) | (y >= image_height))
    leaves = (np.minimum(x, y) < -TOLERANCE) | (right > image_width + TOLERANCE) | (bottom > image_height + TOLERANCE)
    partly = ~empty & ~outside & leaves
    for kind, mask in (("box-empty", empty), ("box-outside", outside), ("box-partly-outside", partly)):
        for row in np.flatnonzero(mask):
            index = int(indices[row])
            seen = f"{show(records[index]['bbox'])} in an image of {image_width[row]:g}x{image_height[row]:g}"
            found.append(_finding(kind, index, records[index], seen))
    _suspect_xyxy(rows[~empty & np.isfinite(image_width)], found)


def _suspect_xyxy(rows, found):
    """Report boxes that seem to be (x1, y1, x2, y2) instead of (x, y, width, height).

    Read as corners, nearly all boxes lie in their image; read as (x, y, width, height), many extend beyond it. (Boxes
    that truly are (x, y, width, height) fit as corners only near the upper left corner of the image.)
    """
    x, y, third, fourth, image_width, image_height = rows.T
    right, bottom = image_width + TOLERANCE, image_height + TOLERANCE
    fit = int(((third > x) & (fourth > y) & (third <= right) & (fourth <= bottom)).sum())
    with np.errstate(over="ignore"):
        leave = int(((x + third > right) | (y + fourth > bottom)).sum())
    if len(rows) >= _ENOUGH and fit >= _FIT * len(rows) and leave >= _LEAVE * len(rows):
        seen = (
            f"of {len(rows)} boxes {fit} lie in their image as (x1, y1, x2, y2), "
            f"{leave} extend beyond it as (x, y, w, h)"
        )
        found.append(Finding("suspected-xyxy", None, None, seen))


def _suspect_shift(used, category_ids, found):
    """Report category ids that are unknown, but all become known if shifted by one or read as list positions."""
    ids, total = set(used), sum(used.values())
    unknown = sum(used[category_id] for category_id in ids - category_ids)
    if not unknown or total < _ENOUGH:
        return
    count = len(category_ids)
    readings = {
        "each plus 1 is known": {category_id + 1 for category_id in ids} <= category_ids,
        "each minus 1 is known": {category_id - 1 for category_id in ids} <= category_ids,
        f"all are positions 0 to {count - 1} in the list of categories": ids <= set(range(count)),
        f"all are positions 1 to {count} in the list of categories": ids <= set(range(1, count + 1)),
    }
    for reading, holds in readings.items():
        if holds:
            seen = f"{unknown} of {total} annotations have an unknown id; of the {len(ids)} ids in use {reading}"
            found.append(Finding("suspected-shift", None, None, seen))
            return


def _finding(kind, index, record, detail):
    return Finding(kind, usable_id(record), index, detail)


_RANK = {kind: rank for rank, kind in enumerate(KINDS)}


def _order(finding):
    return _RANK[finding.kind], -1 if finding.index is None else finding.index


def _size_of(image):
    """(width, height) of a record, or None unless both are positive integers (640.0 is one)."""
    size = image.get("width"), image.get("height")
    if all(type(side) in _NUMBERS and 0 < side < 2**63 and side == int(side) for side in size):
        return int(size[0]), int(size[1])
    return None


def _all_finite(numbers):
    try:
        return all(map(math.isfinite, numbers))
    except OverflowError:  # an integer above the largest float
        return False
