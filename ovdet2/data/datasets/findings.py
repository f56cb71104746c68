"""The kinds of faults that a COCO- or LVIS-format json can have, and the record of one finding.

Values from the json may be of any type and are shown in a bounded number of printable characters.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ovdet2.data.datasets.validity import FLAGS, NEGATIVE, NOT_EXHAUSTIVE, TOLERANCE, as_id

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
_TYPE = 'a number given as text or as a fraction without a remainder, such as "12" or 12.0; an id that is other text'
_CONVERTED = "converted, without loss"

# In the order of the report.
KINDS = {
    "file-empty": Kind("file", "no images or no categories", ""),
    "suspected-xyxy": Kind("file", "boxes that seem to be (x1, y1, x2, y2) instead of (x, y, width, height)", ""),
    "suspected-shift": Kind("file", "category ids that seem to be numbered differently from the categories", ""),
    "suspected-centres": Kind("file", "boxes that seem to be (centre x, centre y, width, height)", ""),
    "suspected-shares": Kind("file", "boxes that seem to be shares of the image, from 0 to 1, instead of pixels", ""),
    "category-record": Kind("category", "not an object", _REMOVED),
    "category-id": Kind("category", "id missing or not a 64-bit integer", _REMOVED),
    "category-type": Kind("category", f"{_TYPE}, or a name given as a number", _CONVERTED),
    "category-copy": Kind("category", "the same record twice", _REMOVED),
    "category-conflict": Kind("category", "an id that another category also has", ""),
    "category-name": Kind("category", "name missing, not text or without a visible character", ""),
    "category-name-twice": Kind("category", "a name that is the same word as that of another category", ""),
    "category-frequency": Kind("category", "LVIS frequency that is not r, c or f", ""),
    "image-record": Kind("image", "not an object", _REMOVED),
    "image-id": Kind("image", "id missing or not a 64-bit integer", _REMOVED),
    "image-type": Kind("image", _TYPE, _CONVERTED),
    "image-copy": Kind("image", "the same record twice", _REMOVED),
    "image-conflict": Kind("image", "an id that another image also has", ""),
    "image-size": Kind("image", "width or height missing or not a positive integer", "taken from the image file"),
    "image-name": Kind("image", "file_name (LVIS: or coco_url) missing or not text", _WITH_BOXES),
    "image-escape": Kind("image", "file name outside of the image folder", _WITH_BOXES),
    "image-backslash": Kind("image", "file name with backslashes, which is found with slashes", "written with slashes"),
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
    "annotation-type": Kind("annotation", f"{_TYPE}, or a polygon that is not in a list", _CONVERTED),
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
    "annotation-flag": Kind("annotation", f"{' or '.join(FLAGS)} that is neither 0 nor 1", "field removed"),
    "segmentation": Kind(
        "annotation", "segmentation without a valid polygon, and no run-length code of the image", "field removed"
    ),
    "polygon": Kind(
        "annotation", "a polygon of odd or fewer than 6 numbers, not finite or far outside", "polygon removed"
    ),
    "mask-missing": Kind("annotation", "no segmentation, which --masks requires", ""),
    "area": Kind("annotation", "area that is not positive, or larger than the image", "set to the area of the box"),
    "image-without-annotations": Kind("image", "without annotations", ""),
    "image-same-file": Kind("image", "the file of another image", ""),
    "category-root": Kind("category", "without annotations, and the supercategory of all others: no class", ""),
    "category-mostly-crowds": Kind("category", "most of its annotations are crowds or ignored", ""),
    "box-twice": Kind("annotation", "the box and category of another annotation of the image", ""),
}
NOTES = {
    "image-without-annotations",
    "image-same-file",
    "category-root",
    "category-mostly-crowds",
    "box-twice",
}


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


def usable_id(record: Mapping[str, Any]) -> int | None:
    """The record's id if it is valid, see :func:`~ovdet2.data.datasets.validity.is_id`; otherwise None."""
    return as_id(record.get("id"))


def finding_of(kind: str, index: int, record: Mapping[str, Any], detail: str) -> Finding:
    """A finding of a record at an index of its list."""
    return Finding(kind, usable_id(record), index, detail)


def show(value: object) -> str:
    """A value from the json in a bounded number of printable characters (repr escapes the others)."""
    return _SHORT.repr(value)


def show_field(record: Mapping[str, Any], key: str) -> str:
    """ "area -1", or "no area"."""
    return f"{key} {show(record[key])}" if key in record else f"no {key}"


def printable(text: str) -> str:
    """``text`` with control characters and characters that cannot be encoded escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
