"""What is valid in a COCO- or LVIS-format json: the one definition of the checker, the repair, the loader and the steps.

Values come from files of strangers and may be of any type. Every function answers for any value and raises nothing.
Boxes are (x, y, width, height) in pixels of the original image, sizes are (width, height).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ovdet2.vocabulary.templates import clean_name, is_visible

TOLERANCE = 1.0  # pixels that a box may extend beyond its image: annotation tools round, and count from 0 or from 1
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"
FLAGS = ("iscrowd", "ignore")
# Detectron2 drops objects of less than 1e-5 pixels, and areas of denormal numbers are zero.
MIN_BOX_SIDE = 1e-4
_NUMBERS = {int, float}  # by type, since a bool is an int
_MAX_PIXELS = 2**32  # COCO's mask code counts the pixels of an image in 32 bits
_MAX_SIDE = 2**31  # sizes are stored in 32 bits with a sign
_PLACEHOLDERS = {"", "n/a", "na", "none", "null", "nil", "nan", "unknown", "undefined", "todo", "-", "?", "#", "."}

NOT_NUMBERS, NOT_FINITE, NO_AREA, OUTSIDE = "not four numbers", "not finite", "no area", "outside"
MALFORMED, OTHER_SIZE, OTHER_LENGTH = "malformed", "another size", "another length"


def is_id(value: object) -> TypeGuard[int]:
    """Whether a value is an integer that fits into int64, as caches and evaluators need; True and 1.0 are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def as_id(value: object) -> int | None:
    """The value if it is an id, see :func:`is_id`; otherwise None, which no id is equal to."""
    return value if is_id(value) else None


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number; booleans, text and integers above the largest float are none."""
    try:
        return type(value) in (int, float) and math.isfinite(value)  # pyrefly: ignore[bad-argument-type]  numbers
    except OverflowError:
        return False


def all_finite(values: Collection[object]) -> bool:
    """Whether all values are finite numbers; made for the millions of coordinates of a json."""
    try:
        return _NUMBERS.issuperset(map(type, values)) and all(map(math.isfinite, values))  # pyrefly: ignore[bad-argument-type]  numbers
    except OverflowError:
        return False


def size_of(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """(width, height) of an image record, or None unless both are positive integers (640.0 is one).

    An image of 2**32 or more pixels is none: no decoder reads it, and masks cannot be coded.
    """
    width, height = image.get("width"), image.get("height")
    if not all(is_finite(side) and side > 0 and side == int(side) for side in (width, height)):
        return None
    size = int(width), int(height)  # pyrefly: ignore[bad-argument-type]  numbers
    return size if size[0] * size[1] < _MAX_PIXELS and max(size) < _MAX_SIDE else None


def is_name(name: object) -> TypeGuard[str]:
    """Whether a value can be the name of a class: text that has a visible character after cleaning."""
    return isinstance(name, str) and is_visible(clean_name(name))


def is_flag(value: object) -> bool:
    """Whether a value is 0 or 1, or false or true, as iscrowd and ignore must be."""
    return type(value) in (int, float, bool) and value in (0, 1)


def is_crowd(annotation: Mapping[str, Any]) -> bool:
    """Whether detections of an object are neither right nor wrong: a crowd, or an object with ``ignore: 1``.

    The second is how some tools store the objects that VOC calls difficult; they are read as these are.
    """
    return any(annotation.get(key, 0) == 1 for key in FLAGS)


def is_difficult(annotation: Mapping[str, Any]) -> bool:
    """Whether an object that does not count is one object, to which a detection is matched by IoU; a crowd is many."""
    return annotation.get("ignore", 0) == 1 and annotation.get("iscrowd", 0) != 1


def box_fault(box: object, size: tuple[float, float] | None = None) -> str | None:
    """What is wrong with a box: NOT_NUMBERS, NOT_FINITE, NO_AREA, OUTSIDE, or None.

    Args:
        box: (x, y, width, height).
        size: of the image; None if it is unknown.
    """
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        return NOT_NUMBERS
    if not all_finite(box):
        return NOT_FINITE
    x, y, width, height = box
    if width < MIN_BOX_SIDE or height < MIN_BOX_SIDE:
        return NO_AREA
    if size is not None and (x + width <= 0 or y + height <= 0 or x >= size[0] or y >= size[1]):
        return OUTSIDE
    return None


def is_area(area: object, size: tuple[float, float] | None = None) -> bool:
    """Whether a value is the area of an object: positive, and not larger than the image if its size is known."""
    return is_finite(area) and area > 0 and (size is None or area <= size[0] * size[1])


def is_polygon(polygon: object, size: tuple[float, float] | None = None) -> TypeGuard[list[float]]:
    """Whether a value is a list [x1, y1, x2, y2, ...] of at least 3 points, all finite.

    With ``size`` no point may be further outside of the image than the image is large: COCO's mask code needs memory in
    proportion to the length of the outline.
    """
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all_finite(polygon):
        return False
    return size is None or all(
        -side <= min(values) and max(values) <= 2 * side for side, values in zip(size, (polygon[::2], polygon[1::2]))
    )


def segmentation_fault(value: object, size: tuple[int, int] | None = None) -> str | None:
    """What is wrong with a mask in COCO's form: MALFORMED, OTHER_SIZE, OTHER_LENGTH, or None.

    Args:
        value: a list of polygons, see :func:`is_polygon`, at least one; or a run-length code {"size": [height, width],
            "counts": list of run lengths or COCO's compressed string}.
        size: of the image; None if it is unknown.
    """
    if isinstance(value, list):
        return None if value and all(is_polygon(polygon, size) for polygon in value) else MALFORMED
    stated = value.get("size") if isinstance(value, dict) else None
    counts = value.get("counts") if isinstance(value, dict) else None
    if not isinstance(stated, list) or len(stated) != 2 or not isinstance(counts, (str, list)):
        return MALFORMED
    code_size = size_of({"height": stated[0], "width": stated[1]})
    if code_size is None:
        return MALFORMED
    if size is not None and code_size != size:
        return OTHER_SIZE
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if runs is None or not all(type(run) is int and run >= 0 for run in runs):
        return MALFORMED
    return None if sum(runs) == code_size[0] * code_size[1] else OTHER_LENGTH


def _decompressed(text: str) -> list[int] | None:
    """The run lengths of COCO's compressed string; None if it is no such string.

    Each number is a sequence of characters of 5 bits, the lowest first; 0x20 says that another follows, 0x10 of the last
    is the sign. From the fourth on they are differences to the run length two places before.
    """
    if not text or not text.isascii():
        return None
    codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63 or codes[-1] & 0x20:
        return None
    ends = np.flatnonzero(codes & 0x20 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 7:  # 8 characters hold 40 bits, more than the pixels of any image
        return None
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((codes & 0x1F) << (5 * places), starts)
    runs -= (codes[ends] & 0x10 != 0) * (np.int64(1) << (5 * (ends - starts + 1)))
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist()


def image_name(image: Mapping[str, Any], lvis: bool) -> str | None:
    """Path of an image below the image root, or None if its record does not state it.

    The path is "file_name". In LVIS it is the last two parts of "coco_url" if that is given
    ("train2017/000000000009.jpg"), as Detectron2 reads LVIS. A text that names no file, such as "N/A", is not given.
    """
    name, url = image.get("file_name"), image.get("coco_url")
    if lvis and isinstance(url, str) and _names_file(url):
        return "/".join(url.strip().split("/")[-2:])
    return name if isinstance(name, str) and name.strip() else None


def _names_file(url):
    scheme, separator, rest = url.strip().partition("://")
    path = rest if separator else scheme
    if separator and "/" not in path:  # a host only
        return False
    return path.lower() not in _PLACEHOLDERS and not path.endswith("/")


def leaves_folder(name: str) -> bool:
    """Whether a file name leads out of the image folder."""
    return os.path.isabs(name) or ".." in Path(name).parts


def is_root_category(category: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a category is only the heading of all others: they name it as their "supercategory".

    Some tools add such a category, which no box has.
    """
    others = [other for other in categories if other is not category]
    name = category.get("name")
    return is_name(name) and bool(others) and all(other.get("supercategory") == name for other in others)


def classes_of(categories: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The categories without a heading of the others that is the same word as one of them.

    A box of such a heading is then of no class of the data set, and refused.
    """
    words = Counter(clean_name(category["name"]) for category in categories if is_name(category.get("name")))
    return [
        category
        for category in categories
        if not (is_root_category(category, categories) and words[clean_name(category["name"])] > 1)
    ]
