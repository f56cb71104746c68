"""Register the user's data sets, which DATASETS.OWN lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from ovdet2.data.datasets.register import METRICS, register_ov_dataset, require_names
from ovdet2.data.datasets.register_readers import FORMATS, register_captions, register_image_labels
from ovdet2.data.samples import BOXES, CAPTIONS, IMAGE_LABELS, KINDS
from ovdet2.errors import UsageError, did_you_mean

# kind -> (required keys of an entry, optional keys), besides "kind"
_KEYS = {
    BOXES: (("name", "json", "images", "base"), ("novel", "base_only", "masks", "metric", "pseudo_labels")),
    CAPTIONS: (("name", "captions"), ("images", "format", "max_bad", "index_file")),
    IMAGE_LABELS: (("name", "images", "base"), ("labels", "novel", "novel_labels", "max_bad")),
}
_Rule = tuple[Callable[[Any], bool], str]  # (whether a value fits, what to give instead)


def _is_text(value):
    return isinstance(value, (str, Path)) and bool(str(value).strip()) and "\0" not in str(value)


def _one_of(values) -> _Rule:
    return lambda value: isinstance(value, str) and value in values, f"one of {', '.join(values)}"


_PATH: _Rule = _is_text, "the path as text, in quotes if it looks like a number, for example 'my_data/train'"
_OPTIONAL_PATH: _Rule = lambda value: value is None or _is_text(value), f"{_PATH[1]}, or leave the key out"
_FLAG: _Rule = lambda value: isinstance(value, bool), "True or False, without quotes"
_ANY: _Rule = lambda value: True, "any value"
# key -> rule of its value; class names have :func:`require_names`
_RULES: dict[str, _Rule] = {
    "name": (lambda value: isinstance(value, str) and _is_text(value), "a text, in quotes if it looks like a number"),
    "json": _PATH,
    "images": _PATH,
    "captions": _PATH,
    "labels": _OPTIONAL_PATH,
    "index_file": _OPTIONAL_PATH,
    **dict.fromkeys(("base_only", "masks", "pseudo_labels", "novel_labels"), _FLAG),
    "metric": _one_of(METRICS),
    "format": _one_of(FORMATS),
    "max_bad": (lambda value: type(value) is int and value >= 0, "a whole number of images, 0 or more, without quotes"),
}
_ENTRIES: dict[str, dict[str, Any]] = {}  # name -> entry that the data set was registered from


def register_own(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.OWN; an entry that is registered already is skipped.

    Args:
        cfg: configuration. DATASETS.OWN is a list of dicts, each with a "kind" (default "boxes"):

            - "boxes": "name", "json", "images" and "base" (class names), and optionally "novel" (class names),
              "base_only", "masks", "metric" and "pseudo_labels", as of :func:`register_ov_dataset`;
            - "captions": "name", "captions" (the file or pattern), and optionally "images" (the folder), "format",
              "max_bad" and "index_file", as of :func:`register_captions`;
            - "image_labels": "name", "images" and "base", and optionally "labels" (the json), "novel", "novel_labels"
              and "max_bad", as of :func:`register_image_labels`.

    Raises:
        UsageError: an entry of another form or with a value of a wrong type, or another data set has the name.
    """
    for number, entry in enumerate(cfg.DATASETS.OWN):
        named = isinstance(entry, Mapping) and entry.get("name")
        where = f"entry {number} of DATASETS.OWN" + (f", {named!r}," if named else "")
        kind = entry.get("kind", BOXES) if isinstance(entry, Mapping) else BOXES
        if kind not in KINDS:
            raise UsageError(f"{where} is of kind {kind!r}: choose one of {', '.join(KINDS)}.")
        _require_keys(entry, kind, where)
        if _ENTRIES.get(entry["name"]) == entry:
            continue
        _REGISTER[kind](entry)
        _ENTRIES[entry["name"]] = entry


def _require_keys(entry, kind, where):
    required, optional = _KEYS[kind]
    form = f"A {kind} entry is {{{', '.join(required)}}}, optionally with {', '.join(optional)}"
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where} is {entry!r}, not a dict. {form}.")
    known = ("kind", *required, *optional)
    faults = [f"has the unknown key {key!r}{did_you_mean(str(key), known)}" for key in entry if key not in known]
    faults += [f"lacks {key!r}" for key in required if key not in entry]
    if faults:
        raise UsageError(f"{where} {' and '.join(faults)}. {form}; kinds: {', '.join(KINDS)}.")
    for key in ("base", "novel"):
        if key in entry:
            require_names(entry[key], f"{key} of {where.removesuffix(',')}")
    for key, value in entry.items():
        # Captions in tar shards have no folder of images.
        fits, wanted = _OPTIONAL_PATH if (kind, key) == (CAPTIONS, "images") else _RULES.get(key, _ANY)
        if not fits(value):
            raise UsageError(f"{key} of {where.removesuffix(',')} is {value!r}: give {wanted}.")


def _options(entry, *keys):
    return {key: entry[key] for key in keys if key in entry}


def _boxes(entry):
    options = _options(entry, "base_only", "masks", "metric", "pseudo_labels")
    register_ov_dataset(entry["name"], entry["json"], entry["images"], entry["base"], entry.get("novel", ()), **options)


def _captions(entry):
    options = _options(entry, "format", "max_bad", "index_file")
    register_captions(entry["name"], entry["captions"], entry.get("images"), **options)


def _image_labels(entry):
    options = _options(entry, "novel_labels", "max_bad") | {"novel_names": tuple(entry.get("novel", ()))}
    register_image_labels(entry["name"], entry.get("labels"), entry["images"], entry["base"], **options)


_REGISTER = {BOXES: _boxes, CAPTIONS: _captions, IMAGE_LABELS: _image_labels}
