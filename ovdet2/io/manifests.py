"""Check the form of a manifest, so that a damaged or foreign one is one sentence instead of a failure far from its file.

A form is one of

- ``str``, ``int``, ``bool``: a value of this type (True is no int, an int is at least 0, half of a surrogate pair no text);
- ``None``: null;
- ``object``: any value;
- ``(form, ...)``: one of several forms;
- ``[form]``: a list of values of the form;
- ``{"key": form, ...}``: an object with these keys and any others; :class:`Optional` marks a key that may be absent;
- ``{str: form}``: an object with any keys.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NAMES: dict[Any, str] = {str: "a text", int: "a whole number of at least 0", bool: "true or false", None: "null"}
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Optional:
    """The form of a key that may be absent."""

    form: Any


def parse_manifest(metadata: Mapping[str, str] | None) -> Any:
    """The manifest in the metadata of a safetensors file; {} if there is none.

    Raises:
        ValueError: it is not JSON that Python can parse.
    """
    try:
        return json.loads((metadata or {}).get("manifest", "{}"))
    except RecursionError:
        raise ValueError("its manifest is nested too deeply") from None


def fault_of(value: Any, form: Any, where: str = "") -> str | None:
    """What is wrong with a value, such as "shards[3].bytes is 'x', not a whole number"; None if it has the form.

    Args:
        value: as json gives it.
        form: see the module.
        where: place of ``value`` in the manifest; "" for the manifest itself.
    """
    if isinstance(form, Optional):
        form = form.form
    if isinstance(form, list) and isinstance(value, list):
        return _first(fault_of(item, form[0], f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(form, dict) and isinstance(value, dict):
        return _fault_of_object(value, form, where)
    if isinstance(form, tuple):
        faults = [fault_of(value, one, where) for one in form]
        # Of several forms the one that the value resembles most explains the fault: it leads farthest inside.
        return None if None in faults else max((fault for fault in faults if fault), key=_depth)
    fits = form is object or (form is None and value is None)
    fits = fits or (form is str and isinstance(value, str) and _is_unicode(value))
    fits = fits or (form is int and type(value) is int and value >= 0) or (form is bool and isinstance(value, bool))
    return None if fits else f"{where or 'it'} is {_shortened(value)}, not {_name_of(form)}"


def _fault_of_object(value, form, where):
    prefix = f"{where}." if where else ""
    if str in form:
        return _first(fault_of(item, form[str], f"{prefix}{_shortened(key)}") for key, item in value.items())
    lacking = [key for key, inner in form.items() if key not in value and not isinstance(inner, Optional)]
    if lacking:
        return f"{where or 'it'} has no {', '.join(lacking)}"
    return _first(fault_of(value[key], inner, f"{prefix}{key}") for key, inner in form.items() if key in value)


def _first(faults):
    return next((fault for fault in faults if fault), None)


def _depth(fault):
    place = fault.partition(" ")[0]
    return place.count(".") + place.count("[")


def _is_unicode(text):
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _name_of(form):
    return (
        _NAMES.get(form) if not isinstance(form, (list, dict)) else "a list" if isinstance(form, list) else "an object"
    )


def _shortened(value):
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
