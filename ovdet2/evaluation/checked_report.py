"""A report.json of unknown origin: its types are checked, so that tables and pages may rely on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError
from ovdet2.io.files import read_json

SCHEMA = "ovdet2/report/"
_REMEDY = "give the report.json of an evaluation by ovdet2, or evaluate again"
_COUNTS = ("images", "detections", "detections_per_image", "distractor_detections")
_TEXTS = ("dataset", "split", "protocol", "metric", "evaluator_type", "scores_tell_nothing")
_TASKS = ("bbox", "segm", "proposals")


def read_report(path: str | Path) -> dict[str, Any]:
    """The report in a file or in a folder that holds a report.json.

    Raises:
        DataError: it is missing, damaged, or no report; the message names the entry.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    report = read_json(
        path,
        "give a report.json or the folder of a finished evaluation, or measure its predictions with ovdet2 report make --dataset",
    )
    if not isinstance(report, dict) or not str(report.get("schema")).startswith(SCHEMA):
        raise DataError(f"{path} is not a report of ovdet2: give a report.json, or the folder that holds it.")
    for entry, value in _faults(report):
        raise DataError(f"{path} is not a valid report: {entry} is {str(value)[:60]!r}: {_REMEDY}.")
    return report


def _faults(report):
    """(entry, value) of each value of a wrong type."""
    yield from _wrong(report, "", {key: _is_count for key in _COUNTS} | {key: _is_text for key in _TEXTS})
    for key in ("dataset", "per_class", "bbox"):
        if key not in report:
            yield key, "missing"
    for task in _TASKS:
        yield from _figures(report.get(task) or {}, task)
    layers = report.get("decoder_layers") or []
    for number, layer in enumerate(layers if isinstance(layers, list) else [layers]):
        yield from _figures(layer, f"decoder_layers[{number}]")
    yield from _classes(report.get("classes", {}))
    yield from _setting(report.get("setting") or {})
    if report.get("bootstrap") is not None:
        yield from _bootstrap(report["bootstrap"])
    yield from _absent_words(report.get("absent_words"))
    rows = report.get("per_class", [])
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield from _row(row, f"per_class[{number}]")
    if not isinstance(report.get("distractors") or [], list):
        yield "distractors", report["distractors"]


def _setting(setting):
    if not isinstance(setting, Mapping):
        yield "setting", setting
        return
    yield from _wrong(setting, "setting.", dict.fromkeys(setting, _is_text))


def _bootstrap(made):
    if not isinstance(made, Mapping):
        yield "bootstrap", made
        return
    counts = ("resamples", "seed", "level")
    yield from (
        (f"bootstrap.{key}", "missing") for key in (*counts, "figures", "intervals", "values") if key not in made
    )
    yield from _wrong(made, "bootstrap.", dict.fromkeys(counts, _is_count))
    yield from _figures(made.get("figures") or {}, "bootstrap.figures")
    for entry, length in (("intervals", 2), ("values", made.get("resamples"))):
        lists = made.get(entry) or {}
        if not isinstance(lists, Mapping):
            yield f"bootstrap.{entry}", lists
            continue
        for key, values in lists.items():
            where = f"bootstrap.{entry}[{key[:40]!r}]"
            if values is None and entry == "intervals":
                continue
            if not isinstance(values, list) or len(values) != length:
                yield where, values
            else:
                yield from _figures(dict(enumerate(values)), where)


def _classes(classes):
    if not isinstance(classes, Mapping):
        yield "classes", classes
        return
    for name, counts in classes.items():
        where = f"classes[{name[:40]!r}]"
        if not isinstance(counts, Mapping):
            yield where, counts
            continue
        lacking = [key for key in ("classes", "with_ground_truth", "boxes") if key not in counts]
        yield from ((f"{where}.{key}", "missing") for key in lacking)
        yield from _wrong(counts, f"{where}.", dict.fromkeys(counts, _is_count))


def _absent_words(entry):
    """Of the entry, which is absent in most reports: what a page and a table read of it."""
    if entry is None:
        return
    if not isinstance(entry, Mapping):
        yield "absent_words", entry
        return
    numbers = ("threshold", "false_positives_per_image", "false_positives_per_image_and_word")
    rules = dict.fromkeys((*numbers, "images_with_false_positives"), _is_number) | {
        "words": _is_count,
        "images": _is_count,
    }
    yield from ((f"absent_words.{key}", "missing") for key in rules if key not in entry)
    yield from _wrong(entry, "absent_words.", rules)
    for key in ("score_quantiles", "highest_score_quantiles"):
        yield from _figures(entry.get(key), f"absent_words.{key}")
    rows = entry.get("per_word")
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        where = f"absent_words.per_word[{number}]"
        if not isinstance(row, Mapping) or not _is_text(row.get("word")):
            yield where, row
        else:
            of_word = ("false_positives_per_image", "highest_score")
            yield from _figures({key: row.get(key, "missing") for key in of_word}, where)


def _row(row, where):
    if not isinstance(row, Mapping):
        yield where, row
        return
    known = {"name": _is_text, "subset": _is_subset, "category_id": _is_count, "boxes": _is_count}
    yield from ((f"{where}.{key}", "missing") for key in ("name", "subset", "category_id") if key not in row)
    yield from _wrong(row, f"{where}.", known)
    yield from _figures(row.get("segm") or {}, f"{where}.segm")
    others = {key: value for key, value in row.items() if key not in (*known, "segm", "group", "frequency")}
    yield from _figures(others, where)


def _figures(figures, where):
    if not isinstance(figures, Mapping):
        yield where, figures
        return
    yield from _wrong(figures, f"{where}.", dict.fromkeys(figures, _is_figure))


def _wrong(entries, where, rules):
    return [(f"{where}{key}", entries[key]) for key, rule in rules.items() if key in entries and not rule(entries[key])]


def _is_count(value):
    return type(value) is int


def _is_figure(value):
    return value is None or type(value) in (int, float)


def _is_number(value):
    return type(value) in (int, float)


def _is_text(value):
    return isinstance(value, str)


def _is_subset(value):
    return value in ("novel", "base")
