"""The kinds of faults that a COCO- or LVIS-format json can have, and the record of one finding.

Values from the json may be of any type and are shown in a bounded number of printable characters.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

TOLERANCE = 1.0  # pixels that a box may extend beyond its image: annotation tools round, and count from 0 or from 1
NEGATIVE, NOT_EXHAUSTIVE = "neg_category_ids", "not_exhaustive_category_ids"

LISTS = {"category": "categories", "image": "images", "annotation": "annotations"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = 120


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        of: what has the fault: "file", "category", "image" or "annotation".
        what: description of the fault.
        fix: what a repair does; "" if the repair is ambiguous and left to the user.
    """

    of: str
    what: str
    fix: str


_REMOVED, _WITH_BOXES = "removed", "removed with its annotations"

# In the order of the report.
KINDS = {
    "file-empty": Kind("file", "no images or no categories", ""),
    "suspected-xyxy": Kind("file", "boxes that seem to be (x1, y1, x2, y2) instead of (x, y, width, height)", ""),
    "suspected-shift": Kind("file", "category ids that seem to be numbered differently from the categories", ""),
    "category-record": Kind("category", "not an object", _REMOVED),
    "category-id": Kind("category", "id missing or not a 64-bit integer", _REMOVED),
    "category-copy": Kind("category", "the same record twice", _REMOVED),
    "category-conflict": Kind("category", "an id that another category also has", ""),
    "category-name": Kind("category", "name missing or not text", ""),
    "category-frequency": Kind("category", "LVIS frequency that is not r, c or f", ""),
    "image-record": Kind("image", "not an object", _REMOVED),
    "image-id": Kind("image", "id missing or not a 64-bit integer", _REMOVED),
    "image-copy": Kind("image", "the same record twice", _REMOVED),
    "image-conflict": Kind("image", "an id that another image also has", ""),
    "image-size": Kind("image", "width or height missing or not a positive integer", _WITH_BOXES),
    "image-name": Kind("image", "file_name (LVIS: or coco_url) missing or not text", _WITH_BOXES),
    "image-escape": Kind("image", "file name outside of the image folder", _WITH_BOXES),
    "image-missing": Kind("image", "no such file", _WITH_BOXES),
    "image-unreadable": Kind("image", "file that cannot be read", _WITH_BOXES),
    "image-mismatch": Kind("image", "file of another size than the json states", _WITH_BOXES),
    "federated-missing": Kind("image", f"LVIS {NEGATIVE} or {NOT_EXHAUSTIVE} missing or not a list", ""),
    "federated-unknown": Kind("image", "LVIS lists with unknown categories", "unknown ids removed from the list"),
    "federated-both": Kind(
        "image", f"categories both in {NEGATIVE} and {NOT_EXHAUSTIVE}", f"ids removed from {NEGATIVE}"
    ),
    "federated-negative": Kind("image", f"{NEGATIVE} of categories that are annotated", f"ids removed from {NEGATIVE}"),
    "annotation-record": Kind("annotation", "not an object", _REMOVED),
    "annotation-id": Kind("annotation", "id missing or not a 64-bit integer", "given a new id"),
    "annotation-copy": Kind("annotation", "the same record twice", _REMOVED),
    "annotation-conflict": Kind("annotation", "an id that another annotation also has", "given a new id"),
    "annotation-field": Kind("annotation", "field missing or of the wrong type", _REMOVED),
    "image-unknown": Kind("annotation", "image_id that no image has", _REMOVED),
    "category-unknown": Kind("annotation", "category_id that no category has", _REMOVED),
    "box-not-finite": Kind("annotation", "box with a value that is not finite", _REMOVED),
    "box-empty": Kind("annotation", "box whose width or height is not positive", _REMOVED),
    "box-outside": Kind("annotation", "box outside of its image", _REMOVED),
    "box-partly-outside": Kind(
        "annotation", f"box that extends beyond its image by more than {TOLERANCE:g} pixel", "clipped to the image"
    ),
    "segmentation": Kind("annotation", "segmentation without a polygon, and no RLE of the image's size", _REMOVED),
    "polygon": Kind("annotation", "a polygon of odd or fewer than 6 numbers, or not finite", "polygon removed"),
    "area": Kind("annotation", "area that is not a positive number", "set to width x height of the box"),
    "image-without-annotations": Kind("image", "without annotations", ""),
}
NOTES = {"image-without-annotations"}


class Finding(NamedTuple):
    """One fault of a json or an image file.

    Attributes:
        kind: a key of KINDS.
        id: of the record; None if it has none, and for a fault of the file.
        index: of the record in its list of the json; None for a fault of the file.
        detail: the faulty value; text from the json is escaped.
    """

    kind: str
    id: int | None
    index: int | None
    detail: str

    @property
    def where(self) -> str:
        """ "annotation 11", or "annotations[3]" if it has no id."""
        of = KINDS[self.kind].of
        if self.id is not None:
            return f"{of} {self.id}"
        return of if self.index is None else f"{LISTS[of]}[{self.index}]"


def is_id(value: object) -> TypeGuard[int]:
    """Whether a value is an integer that fits into int64, as caches and evaluators need; True and 1.0 are none."""
    return type(value) is int and -(2**63) <= value < 2**63


def usable_id(record: Mapping[str, Any]) -> int | None:
    """The record's id if it is valid, see :func:`is_id`; otherwise None."""
    return record["id"] if is_id(record.get("id")) else None


def show(value: object) -> str:
    """A value from the json in a bounded number of printable characters (repr escapes the others)."""
    return _SHORT.repr(value)


def show_field(record: Mapping[str, Any], key: str) -> str:
    """ "area -1", or "no area"."""
    return f"{key} {show(record[key])}" if key in record else f"no {key}"


def printable(text: str) -> str:
    """``text`` with control characters and characters that cannot be encoded escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
