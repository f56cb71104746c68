"""Synonym swap: how much AP is lost when a detector is given other names of the same classes.

Figures are percent; arithmetic is float64.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ovdet2.evaluation.error_analysis import SUBSETS
from ovdet2.vocabulary.templates import clean_name


def other_names(
    names: Sequence[str], synonyms: Mapping[str, Sequence[str]], choice: int | None = 1
) -> dict[str, tuple[str, ...]]:
    """The names to use in place of each class name.

    Names that clean to the name of any class are skipped: they are no other names, or ambiguous.

    Args:
        names: K class names.
        synonyms: other names by the cleaned name of the class, the class name itself included or not.
        choice: position of the name among the remaining ones, from 1 on; None: all of them.

    Returns:
        {class name: names}, without the classes that have no such name.
    """
    taken = set(map(clean_name, names))
    swapped = {}
    for name in names:
        others = {clean_name(other): other for other in synonyms.get(clean_name(name), ())}
        usable = [other for cleaned, other in others.items() if cleaned not in taken]
        chosen = usable if choice is None else usable[choice - 1 : choice]
        if chosen:
            swapped[name] = tuple(chosen)
    return swapped


def name_swap(before: dict[str, Any], after: dict[str, Any], swapped: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Compare the reports of the same weights with the class names and with other names.

    Args:
        before, after: contents of report.json, with the class names and with the other names.
        swapped: {class name: names used in ``after``}, of :func:`other_names`.

    Returns:
        dict for ``json.dumps``: "metric", the figure of the classes (AP50, or AP); "swapped" {subset: the classes with
        other names and ground truth}; "figures" {subset: {"before", "after", "drop"}}, the means over these classes,
        None without any; "all_classes", the same over all classes with ground truth; "per_class", a list of {"name",
        "subset", "names", "before", "after", "drop"} of the swapped classes with ground truth, the largest drop first.
    """
    metric = "AP50" if any(row.get("AP50") is not None for row in before["per_class"]) else "AP"
    later = {row["category_id"]: row.get(metric) for row in after["per_class"]}
    rows = []
    for row in before["per_class"]:
        value, other = row.get(metric), later.get(row["category_id"])
        if value is not None and other is not None:
            figures = {"before": value, "after": other, "drop": value - other}
            rows.append({"name": row["name"], "subset": row["subset"], **figures})
    changed = [row | {"names": list(swapped[row["name"]])} for row in rows if row["name"] in swapped]
    return {
        "metric": metric,
        "swapped": {subset: len(_of(changed, subset)) for subset in SUBSETS},
        "figures": {subset: _means(_of(changed, subset)) for subset in SUBSETS},
        "all_classes": {subset: _means(_of(rows, subset)) for subset in SUBSETS},
        "per_class": sorted(changed, key=lambda row: -row["drop"]),
    }


def swap_lines(result: Mapping[str, Any], shown: int = 10) -> list[str]:
    """A :func:`name_swap` for a terminal, with the ``shown`` classes that lose most."""
    metric = result["metric"]
    lines = [f"{metric:<8}{'class names':>13}{'other names':>13}{'drop':>8}{'classes':>9}"]
    for subset in SUBSETS:
        figures = result["figures"][subset]
        values = [figures and figures[key] for key in ("before", "after", "drop")]
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{subset:<8}{cells[0]:>13}{cells[1]:>13}{cells[2]:>8}{result['swapped'][subset]:>9}")
    lines.append(f"largest drops, {metric} of a class")
    for row in result["per_class"][:shown]:
        pair = f"{row['name']} -> {'; '.join(row['names'])}"
        lines.append(f"{pair:<50.50} {row['subset']:<6}{row['before']:>8.2f}{row['after']:>8.2f}{row['drop']:>8.2f}")
    return lines


def _of(rows, subset):
    return [row for row in rows if subset in ("all", row["subset"])]


def _means(rows):
    if not rows:
        return None
    return {key: math.fsum(row[key] for row in rows) / len(rows) for key in ("before", "after", "drop")}
