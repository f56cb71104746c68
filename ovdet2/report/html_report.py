"""report.html: what an evaluation measured, and where the detector fails, in one self-contained file.

The sections are functions of the report and of :func:`~ovdet2.evaluation.error_analysis.analyse`; they return HTML.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import DataError
from ovdet2.evaluation.calibration import calibration
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.error_analysis import ERROR_KINDS, RECALLS, SUBSETS, analyse, telling_images
from ovdet2.evaluation.matching import match
from ovdet2.evaluation.setting import read_setting, setting_rows
from ovdet2.io.files import write_text
from ovdet2.report.html_parts import (
    bar,
    css_class,
    facts,
    legend,
    line_chart,
    number,
    page,
    profile,
    stacked,
    table,
    text,
    word,
)
from ovdet2.report.pictures import Pictures
from ovdet2.report.score_sections import absent_section, calibration_section

TASKS = {"bbox": "Boxes", "segm": "Masks", "proposals": "Class-agnostic proposals"}
_LINES = {"novel": "novel, solid", "base": "base, dashed", "all": "all, dotted"}
_INTERLEAVED = 150  # most classes whose bars are drawn in one sequence
_SHOWN_APART = {
    "schema", "evaluator_type", "classes", "per_class", "decoder_layers", "setting", "bootstrap", "scores_tell_nothing",
    "absent_words",     *TASKS,
}  # fmt: skip
_KINDS = {
    "classification": "right place (IoU ≥ 0.5 with a box of another class), wrong word",
    "localisation": "right word, IoU of 0.1 to 0.5",
    "both": "wrong word and inexact place",
    "duplicate": "right, but a better detection has found that box",
    "background": "no box with IoU above 0.1",
    "missed": "boxes with no matching detection, even if words and places were repaired",
}
_CALLED = {
    "right": "the right word",
    "novel": "another novel word",
    "base": "another base word",
    "other": "a word outside of the split",
    "nothing": "nothing (no detection with IoU ≥ 0.5)",
}


def write_html(
    path: str | Path, report: dict[str, Any], truth: Truth, detections: Detections, split: Split, pictures: int = 6
) -> None:
    """Write the report of an evaluation as one HTML file without links, scripts or further files.

    Args:
        path: file to write, atomically.
        report: content of report.json.
        truth: :class:`~ovdet2.evaluation.columns.Truth` that was evaluated on; its image records name the files drawn.
        detections: :class:`~ovdet2.evaluation.columns.Detections`, as evaluated.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        pictures: most images drawn of the worst, and of the best.

    Raises:
        DataError: a detection in an image that the data set does not have. A missing or damaged image file is no error
            but is stated in the report.
    """
    title = f"{report['dataset']}: {report['split']}"
    head = title, f"<h1>{text(title)}</h1>", summary(report), class_section(report["per_class"])
    if report.get("scores_tell_nothing"):  # the other sections go by the order of the scores
        write_text(path, page(*head))
        return
    matches = match(truth, detections, crowds=report["evaluator_type"] != "ov_voc")
    analysis = analyse(truth, detections, split, matches)
    drawn = Pictures(truth, detections, split, matches)
    write_text(
        path,
        page(
            *head,
            curve_section(analysis["curves"]),
            error_section(analysis, report),
            confusion_section(analysis["confusion"]),
            calibration_section(calibration(detections, split, matches)),
            absent_section(report.get("absent_words")),
            proposal_section(report.get("proposals") or {}),
            decoder_layer_section(report.get("decoder_layers") or []),
            image_section(drawn, analysis["image_quality"], pictures),
        ),
    )


def summary(report: dict[str, Any]) -> str:
    """What was measured, the main figures, and all of them."""
    main = next(iter(report["bbox"]), "AP50-novel").partition("-")[0]
    intervals = (report.get("bootstrap") or {}).get("intervals", {})
    letters = read_setting(report)["letters"]
    cards = "".join(
        f'<div class="card {subset}">{text(main)} {subset}<b>{number(report["bbox"].get(f"{main}-{subset}"), 1)}</b>'
        f"{_interval(intervals.get(f'{main}-{subset}'))}"
        f'<span class="quiet">{_classes(report["classes"][subset])} classes, setting {text(letters)}</span></div>'
        for subset in SUBSETS
        if subset in report["classes"]
    )
    asked = len(report.get("distractors") or ())
    distractors = (
        f"{asked} distractor words were in the vocabulary as well; their {report['distractor_detections']:,} detections are "
        "ignored after the best detections of each image were selected"
        if asked
        else "There were no distractor words"
    )
    why = report.get("scores_tell_nothing")
    measured = (
        f"<p>{text(report['protocol'])}. {text(report['metric'])}. {report['images']:,} images, "
        f"{report['detections']:,} detections, at most {report['detections_per_image']} an image. {distractors}. "
        "All figures are percent.</p>" + (f'<p class="warning">No AP: {text(why)}</p>' if why else "")
    )
    figures = "".join(
        f"<h3>{title}</h3>{figure_table(report[task], report['classes'])}"
        for task, title in TASKS.items()
        if report.get(task)
    )
    note = "Classes: with ground truth / in the split; those without are not averaged."
    if intervals:
        note += (
            f" Below a figure: its {report['bootstrap']['level']}% interval by {report['bootstrap']['resamples']} resamples of "
            "the images."
        )
    stated = [(key.replace("_", " "), _fact(value)) for key, value in report.items() if key not in _SHOWN_APART]
    return (
        f'{measured}<div class="cards">{cards}</div>{figures}<p class="quiet">{note}</p>'
        f"<h3>What the training saw</h3>{facts([(title, text(said)) for title, said in setting_rows(report)])}"
        f"<h3>How it was measured</h3>{facts(stated)}"
    )


def _interval(ends):
    return f'<span class="quiet">{number(ends[0], 1)} to {number(ends[1], 1)}</span><br>' if ends else ""


def figure_table(figures: Mapping[str, float | None], classes: Mapping[str, Mapping[str, int]]) -> str:
    """Rows of subsets and groups, columns of metrics.

    Args:
        figures: {"AP50-novel": percent or None, ...}.
        classes: {row: {"classes", "with_ground_truth", "boxes"}} of the report.
    """
    named = [key.partition("-")[::2] for key in figures if "-" in key]  # LVIS's APr is AP-r once more
    metrics, rows = (list(dict.fromkeys(part)) for part in zip(*named))
    cells = [
        [
            text(row.replace("_", " ")),
            *(number(figures.get(f"{metric}-{row}")) for metric in metrics),
            _classes(classes.get(row)),
            f"{classes[row]['boxes']:,}" if row in classes else "",
        ]
        for row in rows
    ]
    head = ["", *metrics, "classes", "boxes"]
    return table(head, cells, range(1, len(head)))


def class_section(per_class: Sequence[dict[str, Any]]) -> str:
    """AP50 of each class, best first, novel ones in another colour; AP or recall if there is no AP50.

    Args:
        per_class: rows of the report, at least one: {"name", "subset", "boxes", "AP50", "AP", ...}, with masks also
            "segm", a dict of the figures of masks.
    """
    columns = [key for key in ("AP50", "AP", "P50", "R50") if any(key in row for row in per_class)]
    metric = next((key for key in ("AP50", "AP", "R50") if any(row.get(key) is not None for row in per_class)), "AP")
    rows = sorted(per_class, key=lambda row: -math.inf if row.get(metric) is None else row[metric], reverse=True)
    shown = [row for row in rows if row.get(metric) is not None]
    cells = [
        [
            ("word", f"{word(row['name'])} {_tag(row['subset'])}"),
            ("bars", bar(row.get(metric), 100, row["subset"])),
            *(number(of.get(key), 1) for of in _tasks_of(row) for key in columns),
            f"{row['boxes']:,}",
        ]
        for row in rows
    ]
    head = ["class", metric, *(f"{task}{key}" for task in ("", "mask ")[: len(_tasks_of(rows[0]))] for key in columns)]
    order = "best first"
    if len(shown) > _INTERLEAVED:  # bars thinner than a pixel: mixed colours would blend
        shown.sort(key=lambda row: row["subset"])
        order = "base, then novel, each best first"
    overview = profile([row[metric] for row in shown], [row["subset"] for row in shown]) if shown else ""
    without = len(rows) - len(shown)
    note = f"; the {without:,} without ground truth are last in the table" if without else ""
    return (
        f"<h2>Classes</h2>{legend({'novel': 'novel', 'base': 'base'})}"
        f"<figure>{overview}<figcaption>{metric} of the {len(shown):,} classes, {order}{note}.</figcaption></figure>"
        + table([*head, "objects"], cells, range(2, len(head) + 1), "wide", "scroll tall")
    )


def curve_section(curves: Mapping[str, Sequence[float] | None]) -> str:
    """Precision and recall at IoU 0.5."""
    lines = {name: list(zip(RECALLS.tolist(), curve)) for name in SUBSETS if (curve := curves[name]) is not None}
    ticks = [(value / 5, f"{value / 5:g}") for value in range(6)]
    chart = line_chart(lines, (0, 1), (0, 1), ticks, ticks, ("recall", "precision"))
    note = "Boxes at IoU 0.5: precision at 101 recalls, the mean over classes. The area below a curve is its AP50."
    keys = legend({name: _LINES[name] for name in lines})
    return f'<h2>Precision and recall</h2>{keys}<figure class="chart">{chart}<figcaption>{note}</figcaption></figure>'


def error_section(analysis: dict[str, Any], report: dict[str, Any]) -> str:
    """Kinds of errors, and what repairing each would gain."""
    gains, counts = analysis["dAP50"], analysis["errors"]
    largest = max((gain for kind in gains.values() for gain in kind.values() if gain is not None), default=0)
    rows = [
        [
            ("kind", f'<b>{kind}</b><br><span class="quiet">{_KINDS[kind]}</span>'),
            ("bars", "".join(bar(gains[kind][subset], largest, subset) for subset in ("novel", "base"))),
            *(number(gains[kind][subset], 2) for subset in SUBSETS),
            *(f"{counts[kind][subset]:,}" for subset in ("novel", "base")),
        ]
        for kind in ERROR_KINDS
    ]
    head = ["error", "points of AP50 to gain", "novel", "base", "all", "errors: novel", "errors: base"]
    recomputed = ", ".join(f"{subset} {number(analysis['AP50'][subset])}" for subset in SUBSETS)
    said = [report["bbox"].get(f"AP50-{subset}") for subset in SUBSETS]
    differs = any(
        told is not None and found is not None and abs(told - found) > 0.05
        for told, found in zip(said, analysis["AP50"].values())
    )
    warning = (
        '<p class="warning">The AP50 of this analysis is not that of the summary: the two were not computed from the '
        "same predictions or not by the same rule.</p>"
        if differs
        else ""
    )
    left_out = f" {analysis['left_out']:,} detections are ignored." if analysis["left_out"] else ""
    return (
        "<h2>Errors</h2><p>How much AP50 of boxes would rise if only errors of one kind were repaired (TIDE, Bolya et "
        "al., ECCV 2020). The gains do not add up. A false positive is counted for the subset of its word, a "
        f"missed box for the subset of its class; the gains are of the subset's classes.{left_out}</p>"
        f"<p>AP50 before any repair: {recomputed}.</p>{warning}{legend({'novel': 'novel', 'base': 'base'})}"
        + table(head, rows, (2, 3, 4, 5, 6), "wide")
    )


def confusion_section(confusion: dict[str, Any]) -> str:
    """The words that detections give to ground-truth boxes."""
    parts = []
    for subset, counts in confusion["boxes"].items():
        total = sum(counts.values())
        if total:
            shares = ", ".join(f"{100 * n / total:.1f}% {_CALLED[key]} ({n:,})" for key, n in counts.items() if n)
            parts.append(f"<h3>The {total:,} {subset} boxes</h3>{stacked(counts)}<p>{shares}</p>")
    largest = max((pair["count"] for pair in confusion["pairs"]), default=0)
    rows = [
        [
            ("word", f"{word(pair['true'])} {_tag(pair['true_subset'])}"),
            ("word", f"{word(pair['said'])} {_tag(pair['said_subset'])}"),
            ("bars", bar(pair["count"], largest, pair["true_subset"])),
            f"{pair['count']:,}",
        ]
        for pair in confusion["pairs"]
    ]
    listed = table(["true word", "predicted word", "boxes", ""], rows, (3,), "wide") if rows else "<p>No confusion.</p>"
    return (
        "<h2>Confusion among the words</h2><p>The word of the best-scoring detection on each box: of any word, with "
        "IoU ≥ 0.5, and not matched to another box of the same class. A novel object called by a base word is the "
        "failure peculiar to open-vocabulary detectors.</p>"
        + legend({key: name for key, name in _CALLED.items() if any(c[key] for c in confusion["boxes"].values())})
        + "".join(parts)
        + f"<h3>The most frequent confusions</h3>{listed}"
    )


def proposal_section(recall: Mapping[str, float | None]) -> str:
    """Recall of the proposals over their number; nothing where the model gave none."""
    lines = {}
    for key, value in recall.items():
        metric, _, subset = key.partition("-")
        if subset in SUBSETS and value is not None and metric.startswith("AR@"):
            lines.setdefault(subset, []).append((int(metric.removeprefix("AR@")), value))
    if not lines:
        return ""
    limits = sorted({limit for points in lines.values() for limit, _ in points})
    ends = (math.log(limits[0] / 1.2), math.log(limits[-1] * 1.2))
    chart = line_chart(
        {name: [(math.log(limit), value) for limit, value in sorted(lines[name])] for name in SUBSETS if name in lines},
        ends,
        (0, 100),
        [(math.log(limit), str(limit)) for limit in limits],
        [(value, str(value)) for value in range(0, 101, 20)],
        ("proposals an image", "average recall, %"),
        markers=True,
    )
    note = "Recall of class-agnostic proposals, averaged over IoU 0.50:0.05:0.95. Detections need a proposal."
    return (
        f"<h2>Proposals</h2>{legend({name: _LINES[name] for name in SUBSETS if name in lines})}"
        f'<figure class="chart">{chart}<figcaption>{note}</figcaption></figure>'
    )


def decoder_layer_section(layers: Sequence[Mapping[str, float | None]]) -> str:
    """AP of every decoder layer; nothing for a detector without decoder layers.

    Args:
        layers: a dict {"AP50-novel": percent or None, ...} for each, the first layer's first.
    """
    if not layers:
        return ""
    names = [name for name in layers[0] if name.partition("-")[2] in SUBSETS]
    rows = [[str(place), *(number(layer[name]) for name in names)] for place, layer in enumerate(layers, start=1)]
    listed = table(["layer", *(name.replace("-", " ") for name in names)], rows, range(1, len(names) + 1))
    return f"<h2>Decoder layers</h2><p>Boxes. The last layer's figures are the detector's.</p>{listed}"


def image_section(pictures: Pictures, quality: dict[int, tuple[float, int]], count: int) -> str:
    """The worst and the best images, ground truth beside detections.

    Args:
        pictures: :class:`~ovdet2.report.pictures.Pictures`.
        quality: of :func:`~ovdet2.evaluation.error_analysis.image_quality`.
        count: of each at most.
    """
    rule = (
        "Of an image with n boxes the n best-scoring detections that count are drawn, ✓ where right. Images are "
        "ordered by the share that is right, then by n. Orange: novel words, blue: base words. Crowds are not drawn."
    )
    parts = [f"<h2>Images</h2><p>{rule}</p>"]
    for title, image_ids in zip(("Worst", "Best"), telling_images(quality, count)):
        figures = "".join(_image_figure(pictures, image_id, *quality[image_id]) for image_id in image_ids)
        parts.append(f'<h3>{title}</h3><div class="pictures">{figures or "<p>None.</p>"}</div>')
    if pictures.numbered:
        words = ", ".join(f"{number} {word(name)}" for number, name in sorted(pictures.numbered.items()))
        parts.append(f"<p>No installed font has the characters of: {words}.</p>")
    return "".join(parts)


def _image_figure(pictures, image_id, share, count):
    """One image; ``share`` of its ``count`` best detections is true."""
    try:
        pair = {"ground truth": pictures.truth(image_id), "detections": pictures.detections(image_id, count)}
    except DataError as error:
        shown = f'<p class="warning">Not drawn: {text(error)}</p>'
    else:
        images = "".join(
            f'<div class="quiet">{name}<img src="{uri}" alt="{name} of image {image_id}"></div>'
            for name, uri in pair.items()
        )
        shown = f'<div class="pair">{images}</div>'
    caption = f"Image {image_id}, {text(pictures.file_name(image_id))}: {round(share * count)} of {count} right"
    return f"<figure>{shown}<figcaption>{caption}.</figcaption></figure>"


def _tasks_of(row):
    """The dicts of figures of a class: of boxes, and of masks where it has them."""
    return [row, row["segm"]] if "segm" in row else [row]


def _classes(counts):
    return text(f"{counts['with_ground_truth']}/{counts['classes']}") if counts else ""


def _tag(subset):
    return f'<span class="tag {css_class(subset)}">{text(subset)}</span>'


def _fact(value):
    """A value of the report as HTML: lists joined by commas, dicts one entry a line."""
    if isinstance(value, dict):
        return "<br>".join(f"{text(key)}: {_fact(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, list):
        return text(", ".join(map(str, value))) or "none"
    return "none" if value is None else text(f"{value:,}" if type(value) is int else value)
