"""The kinds of fault that a COCO- or LVIS-format json can have, and one finding of a kind.

Values from the json may be of any type and are shown in a bounded number of printable characters.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

TOLERANCE = 1.0  # pixels by which a box may leave its image: annotation tools round, and count from 0 or from 1
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"

LISTS = {"category": "categories", "image": "images", "annotation": "annotations"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


class Kind(NamedTuple):
    """A kind of finding: of what ("file", "category", "image", "annotation"), in words, and what a repair does about it
    ("" where it would have to guess)."""

    of: str
    what: str
    fix: str


_REMOVED, _WITH_BOXES = "removed", "removed with its annotations"

# In the order of the report.
KINDS = {
    "file-empty": Kind("file", "no images or no categories", ""),
    "suspected-xyxy": Kind("file", "boxes that seem to be (x1, y1, x2, y2) instead of (x, y, width, height)", ""),
    "suspected-shift": Kind("file", "category ids that seem to be numbered otherwise than the categories", ""),
    "category-record": Kind("category", "not an object", _REMOVED),
    "category-id": Kind("category", "id missing or not a 64-bit integer", _REMOVED),
    "category-copy": Kind("category", "the same record twice", _REMOVED),
    "category-conflict": Kind("category", "an id that another category has, too", ""),
    "category-name": Kind("category", "name missing or not text", ""),
    "category-frequency": Kind("category", "LVIS frequency that is not r, c or f", ""),
    "image-record": Kind("image", "not an object", _REMOVED),
    "image-id": Kind("image", "id missing or not a 64-bit integer", _REMOVED),
    "image-copy": Kind("image", "the same record twice", _REMOVED),
    "image-conflict": Kind("image", "an id that another image has, too", ""),
    "image-size": Kind("image", "width or height missing or not a positive integer", _WITH_BOXES),
    "image-name": Kind("image", "file_name (LVIS: or coco_url) missing or not text", _WITH_BOXES),
    "image-escape": Kind("image", "file name that leaves the image folder", _WITH_BOXES),
    "image-missing": Kind("image", "no such file", _WITH_BOXES),
    "image-unreadable": Kind("image", "file that cannot be read", _WITH_BOXES),
    "image-mismatch": Kind("image", "file of another size than the json says", _WITH_BOXES),
    "federated-missing": Kind("image", f"LVIS {NEGATIVE} or {NOT_EXHAUSTIVE} missing or not a list", ""),
    "federated-unknown": Kind("image", "LVIS lists with unknown categories", "unknown ids taken out of the list"),
    "federated-both": Kind("image", f"categories both in {NEGATIVE} and {NOT_EXHAUSTIVE}", f"taken out of {NEGATIVE}"),
    "federated-negative": Kind("image", f"{NEGATIVE} of categories that are annotated", f"taken out of {NEGATIVE}"),
    "annotation-record": Kind("annotation", "not an object", _REMOVED),
    "annotation-id": Kind("annotation", "id missing or not a 64-bit integer", "given a new id"),
    "annotation-copy": Kind("annotation", "the same record twice", _REMOVED),
    "annotation-conflict": Kind("annotation", "an id that another annotation has, too", "given a new id"),
    "annotation-field": Kind("annotation", "field missing or of the wrong type", _REMOVED),
    "image-unknown": Kind("annotation", "image_id that no image has", _REMOVED),
    "category-unknown": Kind("annotation", "category_id that no category has", _REMOVED),
    "box-not-finite": Kind("annotation", "box with a value that is not finite", _REMOVED),
    "box-empty": Kind("annotation", "box whose width or height is not positive", _REMOVED),
    "box-outside": Kind("annotation", "box outside of its image", _REMOVED),
    "box-partly-outside": Kind(
        "annotation", f"box that leaves its image by more than {TOLERANCE:g} pixel", "clipped to the image"
    ),
    "segmentation": Kind("annotation", "segmentation without a polygon, and no RLE of the image's size", _REMOVED),
    "polygon": Kind("annotation", "a polygon of odd or fewer than 6 numbers, or not finite", "polygon taken out"),
    "area": Kind("annotation", "area that is not a positive number", "set to width x height of the box"),
    "image-without-annotations": Kind("image", "without annotations", ""),
}
NOTES = {"image-without-annotations"}


class Finding(NamedTuple):
    """One thing found: a key of KINDS, the data set's id (None where the record has none, and of the file), the index
    in the list of the json (None of the file), and what was seen. Any text from the json in ``detail`` is escaped."""

    kind: str
    id: int | None
    index: int | None
    detail: str

    @property
    def where(self) -> str:
        """ "annotation 11", or "annotations[3]" where it has no id."""
        of = KINDS[self.kind].of
        if self.id is not None:
            return f"{of} {self.id}"
        return of if self.index is None else f"{LISTS[of]}[{self.index}]"


def is_id(value: object) -> TypeGuard[int]:
    """Whether it is an integer that fits the int64 of caches and evaluators; True and 1.0 are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def usable_id(record: Mapping[str, Any]) -> int | None:
    """The record's id, or None where it has none that :func:`is_id`."""
    return record["id"] if is_id(record.get("id")) else None


def show(value: object) -> str:
    """A value from the json in a bounded number of printable characters (repr escapes the others)."""
    return _SHORT.repr(value)


def show_field(record: Mapping[str, Any], key: str) -> str:
    """ "area -1", or "no area"."""
    return f"{key} {show(record[key])}" if key in record else f"no {key}"


def printable(text: str) -> str:
    """``text`` with what would steer a terminal, or cannot be encoded, escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
