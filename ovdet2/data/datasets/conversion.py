"""Convert what a json states in another type without loss: "12" or 12.0 for 12, null for no crowd, a flat polygon.

Ids of images and categories that are other text, such as "img_a", or larger than 64 bits are replaced by new numbers, in
the annotations too. The checker reports each conversion and checks the converted record; the repair writes it. Nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ovdet2.data.datasets.findings import Finding, show
from ovdet2.data.datasets.validity import FLAGS, NEGATIVE, NOT_EXHAUSTIVE, as_id, is_finite

_DECIMAL = re.compile(r"[+-]?\d{1,300}(\.\d{0,300})?([eE][+-]?\d{1,3})?", re.ASCII)
_EXACT = 2**53  # above, floats do not hold every integer


def convert(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Finding]]:
    """Convert the records of a json.

    Args:
        data: parsed json with COCO's three lists, of which records may be of any type; not changed.

    Returns:
        (converted, findings): a json that shares unchanged records with ``data``; and a finding for each converted
        field, of the kind "category-type", "image-type" or "annotation-type", whose detail is "id '7' -> 7".
    """
    converted, findings = dict(data), []
    numbers: dict[str, dict[Any, int]] = {}  # field of annotations -> {other text: new id}
    for of, key, fields in (
        ("category", "categories", _CATEGORY),
        ("image", "images", _IMAGE),
        ("annotation", "annotations", _ANNOTATION),
    ):
        records = list(data[key])
        if of != "annotation":
            numbers[f"{of}_id"] = _numbered(records)
            fields = fields | {"id": _looked_up(numbers[f"{of}_id"])}
        else:
            fields = fields | {name: _looked_up(known) for name, known in numbers.items()}
        for index, record in enumerate(records):
            changed = _changed(record, fields) if isinstance(record, dict) else None
            if changed:
                records[index] = {**record, **changed}
                record_id = as_id(records[index].get("id"))
                for name, value in changed.items():
                    detail = f"{name} {show(record[name])} -> {show(value)}"
                    findings.append(Finding(f"{of}-type", record_id, index, detail))
        converted[key] = records
    return converted, findings


def _numbered(records: list[Any]) -> dict[Any, int]:
    """{id that is text or too large: new id} of records, in their order; the new ids are above all others."""
    ids = [as_integer(record.get("id")) for record in records if isinstance(record, dict)]
    odd = {value: None for value in ids if type(value) in (str, int) and as_id(value) is None and value != ""}
    largest = max((value for value in ids if as_id(value) is not None), default=0)
    return {value: number for number, value in enumerate(odd, start=max(largest, 0) + 1) if as_id(number) is not None}


def _looked_up(numbers: Mapping[Any, int]) -> Callable[[Any], Any]:
    """The conversion of an id, with the new numbers of those that are no integers."""
    if not numbers:
        return as_integer

    def conversion(value):
        integer = as_integer(value)
        return numbers.get(integer, integer) if type(integer) in (str, int) else integer

    return conversion


def _changed(record: dict[str, Any], fields: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """{field: converted value} of the fields that a conversion changes."""
    changed = {}
    for name, conversion in fields.items():
        if name in record:
            value = conversion(record[name])
            if value is not record[name]:
                changed[name] = value
    return changed


def as_number(value: object) -> Any:
    """A number written as text as a number; any other value unchanged."""
    if type(value) is not str or not _DECIMAL.fullmatch(value.strip()):
        return value
    text = value.strip()
    number = int(text) if text.lstrip("+-").isdigit() else float(text)
    return number if is_finite(number) else value


def as_integer(value: object) -> Any:
    """An integer written as text, or as a float without a remainder, as an integer; any other value unchanged."""
    if type(value) is int:
        return value
    number = as_number(value)
    if type(number) is float and abs(number) < _EXACT and number == int(number):
        return int(number)
    return number if type(number) is int else value


def _side(value: object) -> Any:
    return value if type(value) is float else as_integer(value)  # 640.0 is valid


def _integers(value: object) -> Any:
    return _each(value, as_integer)


def _numbers(value: object) -> Any:
    if isinstance(value, list) and {int, float}.issuperset(map(type, value)):  # nearly all: polygons are long
        return value
    return _each(value, as_number)


def _each(value: object, conversion: Callable[[Any], Any]) -> Any:
    """A list with converted elements; the same list if none changes, and any other value unchanged."""
    if not isinstance(value, list) or all(type(element) is int for element in value):
        return value
    elements = [conversion(element) for element in value]
    return value if all(new is old for new, old in zip(elements, value)) else elements


def _flag(value: object) -> Any:
    """A flag; null, "" and "false" are 0."""
    if type(value) is bool or (type(value) is int and value in (0, 1)):
        return value
    if value is None:
        return 0
    named = {"": 0, "false": 0, "no": 0, "true": 1, "yes": 1}
    if type(value) is str and value.strip().lower() in named:
        return named[value.strip().lower()]
    return as_integer(value)


def _segmentation(value: object) -> Any:
    """Polygons of numbers, in a list; a run-length code of integers."""
    if isinstance(value, dict):
        changed = _changed(value, {"size": _integers, "counts": _integers})
        return {**value, **changed} if changed else value
    if not isinstance(value, list) or not value:
        return value
    if all(is_finite(as_number(element)) for element in value):  # one polygon, not in a list of polygons
        polygon = [as_number(element) for element in value]
        return [polygon] if len(polygon) >= 6 and len(polygon) % 2 == 0 else value
    if len(value) >= 3 and all(map(_is_point, value)):  # one polygon as a list of points
        value = [value]
    return _each(value, _polygon)


def _is_point(value):
    return isinstance(value, list) and len(value) == 2 and all(is_finite(as_number(number)) for number in value)


def _polygon(value: object) -> Any:
    """A list of numbers; also of a list of points."""
    if isinstance(value, list) and len(value) >= 3 and all(map(_is_point, value)):
        value = [number for point in value for number in point]
    return _numbers(value)


def _name(value: object) -> Any:
    return str(value) if type(value) is int and as_id(value) is not None else value


_CATEGORY = {"id": as_integer, "name": _name}
_IMAGE = {"id": as_integer, "width": _side, "height": _side, NEGATIVE: _integers, NOT_EXHAUSTIVE: _integers}
_ANNOTATION = {
    "id": as_integer,
    "image_id": as_integer,
    "category_id": as_integer,
    "bbox": _numbers,
    **dict.fromkeys(FLAGS, _flag),
    "area": as_number,
    "segmentation": _segmentation,
}
