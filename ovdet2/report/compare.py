"""Two reports side by side: whether they may be compared, what differs, as text and as HTML."""

from typing import Any

from ovdet2.errors import DataError
from ovdet2.evaluation.bootstrap import paired_intervals
from ovdet2.evaluation.setting import setting_rows
from ovdet2.report.html_parts import bar, css_class, facts, legend, number, page, table, text, word

TASKS = {"bbox": "boxes", "segm": "masks", "proposals": "proposals"}
# What two evaluations must share for their figures to mean the same.
SAME = ("dataset", "json_sha256", "split", "protocol", "metric", "detections_per_image", "distractors")


_IMAGES = {"dataset", "json_sha256"}  # if these differ, the images do


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of :data:`SAME` in which two reports differ.

    Returns:
        {key: (value of a, value of b)}, None for an entry that one of them does not have.
    """
    return {key: (a.get(key), b.get(key)) for key in SAME if a.get(key) != b.get(key)}


def require_comparable(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Raise a :class:`~ovdet2.errors.DataError` that names what differs, unless two reports measured the same."""
    unlike = differences(a, b)
    if unlike:
        raise DataError(
            "the two reports did not measure the same: "
            + "; ".join(f"{key} {one!r} against {other!r}" for key, (one, other) in unlike.items())
            + ". Evaluate both in the same way, or add --anyway to compare the figures regardless."
        )


def compare(a: dict[str, Any], b: dict[str, Any], most: int = 10) -> dict[str, Any]:
    """What differs between two reports.

    Args:
        a, b: contents of report.json.
        most: classes listed of the largest gains, and of the largest losses.

    Returns:
        dict with "unlike" (:func:`differences`), "settings" (rows of what the two trainings saw: (title, text of a, of
        b)), "intervals" of the differences of boxes on the same resamples of the images
        (:func:`~ovdet2.evaluation.bootstrap.paired_intervals`; empty if the reports have none, or not on the same images),
        "figures" {task: [(figure, value of a, of b, difference b - a), ...]}
        (None where one does not have it), "metric" of the classes, "gains" and "losses": lists of (name, subset, value
        of a, of b, difference), the largest first. Classes are paired by their category id, and skipped if either
        has no figure.
    """
    figures, unlike = {}, differences(a, b)
    for task in TASKS:
        one, other = a.get(task) or {}, b.get(task) or {}
        rows = [(key, one.get(key), other.get(key)) for key in dict.fromkeys((*one, *other))]
        if rows:
            figures[task] = [(*row, _difference(*row[1:])) for row in rows]
    known = [key for key in ("AP50", "AP", "R50") if any(row.get(key) is not None for row in a["per_class"])]
    metric = known[0] if known else "AP"
    of_a = {row["category_id"]: row.get(metric) for row in a["per_class"]}
    changes = [
        (row["name"], row["subset"], before, row[metric], row[metric] - before)
        for row in b["per_class"]
        if (before := of_a.get(row["category_id"])) is not None and row.get(metric) is not None
    ]
    changes.sort(key=lambda change: -change[-1])
    return {
        "unlike": unlike,
        "settings": _settings(a, b),
        "intervals": {} if _IMAGES & unlike.keys() else paired_intervals(a.get("bootstrap"), b.get("bootstrap")),
        "figures": figures,
        "metric": metric,
        "gains": [change for change in changes if change[-1] > 0][:most],
        "losses": [change for change in reversed(changes) if change[-1] < 0][:most],
    }


def as_text(comparison: dict[str, Any], names: tuple[str, str]) -> str:
    """A comparison for a terminal.

    Args:
        comparison: of :func:`compare`.
        names: (of A, of B), such as their paths.

    Returns:
        String of several lines without a final newline.
    """
    lines = [f"A: {names[0]}", f"B: {names[1]}"]
    if comparison["unlike"]:
        lines.append("NOT MEASURED IN THE SAME WAY, the differences mean little:")
        lines += [f"  {key}: A {one!r}, B {other!r}" for key, (one, other) in comparison["unlike"].items()]
    lines += [f"{title}: {a}" if a == b else f"{title}: A {a}; B {b}" for title, a, b in comparison["settings"]]
    for task, rows in comparison["figures"].items():
        intervals = comparison["intervals"] if task == "bbox" else {}
        head = "   interval of B - A" if intervals else ""
        lines += ["", f"{TASKS[task]:<28}{'A':>9}{'B':>9}{'B - A':>9}{head}"]
        lines += [
            f"{key:<28}{number(a):>9}{number(b):>9}{number(d, sign=True):>9}{_between(intervals.get(key), '   ')}"
            for key, a, b, d in rows
        ]
    if comparison["intervals"]:
        lines += ["", _PAIRED]
    for kind in ("gains", "losses"):
        lines += ["", f"largest {kind}, {comparison['metric']} of a class" + ("" if comparison[kind] else ": none")]
        lines += [
            f"{name:<22.22}{subset:<6}{number(a):>9}{number(b):>9}{number(d, sign=True):>9}"
            for name, subset, a, b, d in comparison[kind]
        ]
    return "\n".join(lines)


def as_html(comparison: dict[str, Any], reports: tuple[dict[str, Any], dict[str, Any]], names: tuple[str, str]) -> str:
    """A comparison as one HTML page; arguments as of :func:`as_text`, and the two reports."""
    title = f"{reports[0]['dataset']}: two evaluations"
    parts = [f"<h1>{text(title)}</h1>"]
    if comparison["unlike"]:
        rows = [(key, f"A: {text(one)}<br>B: {text(other)}") for key, (one, other) in comparison["unlike"].items()]
        parts.append(
            f'<div class="warning"><b>Not measured in the same way: the differences mean little.</b>{facts(rows)}</div>'
        )
    parts.append(
        table(
            ["", "A", "B"], [[text(title), text(one), text(other)] for title, one, other in comparison["settings"]], ()
        )
    )
    runs = [(letter, _run(name, report)) for letter, name, report in zip("AB", names, reports)]
    parts.append(facts(runs))
    for task, rows in comparison["figures"].items():
        intervals = comparison["intervals"] if task == "bbox" else {}
        head = ["", "A", "B", "B − A", *(["interval"] if intervals else [])]
        cells = [
            [text(key), number(a), number(b), number(d, sign=True), _between(intervals.get(key))][: len(head)]
            for key, a, b, d in rows
        ]
        parts.append(f"<h2>{TASKS[task].capitalize()}</h2>" + table(head, cells, range(1, len(head))))
    if comparison["intervals"]:
        parts.append(f"<p>{_PAIRED}</p>")
    parts.append(f"<h2>Classes</h2>{legend({'novel': 'novel', 'base': 'base'})}")
    largest = max((abs(row[-1]) for kind in ("gains", "losses") for row in comparison[kind]), default=0)
    for kind in ("gains", "losses"):
        cells = [
            [
                ("word", f'{word(name)} <span class="tag {css_class(subset)}">{text(subset)}</span>'),
                ("bars", bar(abs(d), largest, subset)),
                *(number(a), number(b), number(d, sign=True)),
            ]
            for name, subset, a, b, d in comparison[kind]
        ]
        listed = table(["class", comparison["metric"], "A", "B", "B − A"], cells, (2, 3, 4), "wide")
        parts.append(f"<h3>Largest {kind}</h3>{listed if cells else '<p>None.</p>'}")
    return page(title, *parts)


_PAIRED = (
    "The interval of a difference is by the same resamples of the images for A and B: a difference whose interval contains "
    "0 may be due to the choice of images."
)


def _settings(a, b):
    """(title, text of a, of b) of what the trainings saw."""
    titles = dict.fromkeys(title for report in (a, b) for title, _ in setting_rows(report))
    one, other = (dict(setting_rows(report)) for report in (a, b))
    return [(title, one.get(title, ""), other.get(title, "")) for title in titles]


def _between(ends, before=""):
    """ "-1.20 to +0.30"; empty without an interval."""
    return f"{before}{number(ends[0], sign=True)} to {number(ends[1], sign=True)}" if ends else ""


def _run(name, report):
    """The path of a report and how it was made, as HTML."""
    stated = [f"{key} {report[key]}" for key in ("finished", "git_commit", "command") if report.get(key)]
    return "<br>".join(map(text, (name, *stated)))


def _difference(before, after):
    return None if before is None or after is None else after - before
