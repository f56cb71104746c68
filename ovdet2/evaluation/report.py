"""Output of an evaluation: ``report.json`` (schema "ovdet2/report/2"), Detectron2's results dict, and a printed table.

All figures are percent. A figure that does not exist (no ground truth) is null in the json and nan in the results. A
set without classes, such as the base classes of a transfer target, has no figures.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation.coco_ap import mean_of
from ovdet2.evaluation.setting import meaning, read_setting, setting_rows

SCHEMA = "ovdet2/report/2"
TASKS = ("bbox", "segm")
_RULES = "AP50 and AP75 at IoU 0.50 and 0.75, AP over IoU 0.50:0.05:0.95, 101 recall points"
_SIZES = "s, m, l below 32², to 96² and above, in square pixels; AR over the same IoUs"
_METRICS = {
    "ov_coco": f"COCO: {_RULES}, all areas; {_SIZES}",
    "ov_lvis": f"LVIS, federated: {_RULES}, all areas; {_SIZES}; r, c, f are rare, common, frequent classes",
    "ov_voc": "VOC objects by COCO's AP: AP50 and AP75 at IoU 0.50 and 0.75, 101 recall points, all areas; difficult "
    "objects are ignored; AR over IoU 0.50:0.05:0.95",
}


def figure_names(metric: str, limit: int) -> tuple[str, ...]:
    """The figures of a metric for one task, in the order of the table.

    Args:
        metric: "ov_coco", "ov_lvis" or "ov_voc".
        limit: detections per image.
    """
    if metric == "ov_voc":
        return ("AP50", "AP75")
    first = ("AP", "AP50") if metric == "ov_lvis" else ("AP50", "AP")
    return (*first, "AP75", "APs", "APm", "APl", f"AR@{limit}")


def class_subsets(split: Split) -> dict[str, tuple[int, ...]]:
    """Dict of report row to the dataset category ids it averages over: novel, base, all, then the split's groups."""
    base = len(split.base)
    subsets = {"novel": split.category_ids[base:], "base": split.category_ids[:base], "all": split.category_ids}
    subsets |= {group: tuple(ids) for group, ids in split.groups.items()}
    return {subset: ids for subset, ids in subsets.items() if ids}


def class_means(per_class: dict[int, dict[str, float]], split: Split, names: Sequence[str]) -> OrderedDict[str, float]:
    """Means over the classes that have ground truth.

    Args:
        per_class: {category id: {figure: percent}}, nan for a class without ground truth.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        names: the figures.

    Returns:
        OrderedDict "AP50-novel", "AP50-base", "AP50-all", "AP50-<group>", ..., then the same of the next figure.
    """
    return OrderedDict(
        (f"{name}-{subset}", mean_of(per_class[category_id][name] for category_id in ids))
        for name in names
        for subset, ids in class_subsets(split).items()
    )


def build_report(
    split: Split,
    metric: str,
    figures: dict[str, dict[int, dict[str, float]]],
    objects: dict[int, int],
    recall: dict[str, float],
    facts: dict[str, Any],
    earlier_layers: Sequence[dict[int, dict[str, float]]] = (),
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The content of report.json.

    Args:
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        metric: "ov_coco", "ov_lvis" or "ov_voc".
        figures: {"bbox": {category id: {figure: percent}}, "segm": the same, if there are masks}.
        objects: {category id: ground-truth objects that are not crowd}.
        recall: {"AR@100-novel": percent, ...}; empty when the model gave no proposals.
        facts: further entries: dataset, images, detections_per_image, seconds, versions, ...
        earlier_layers: like ``figures["bbox"]``, for each decoder layer before the last; ``figures`` are of the last.
        names: the figures; None: those of the metric, see :func:`figure_names`.

    Returns:
        dict for ``json.dumps``; no nan in it. "bbox", "segm" and "proposals" are flat: {"AP50-novel": percent, ...},
        by the rules of LVIS with "APr", "APc" and "APf" as well; "segm" and "proposals" may be empty. "per_class"
        rows hold the figures of boxes, and those of masks below "segm". "decoder_layers" is a list of dicts like "bbox"
        with AP50 and AP (where the metric has it) of each layer, the last one's as in "bbox"; empty without
        ``earlier_layers``.
    """
    names = figure_names(metric, facts["detections_per_image"]) if names is None else names
    means = {task: class_means(figures[task], split, names) if task in figures else {} for task in TASKS}
    if metric == "ov_lvis":
        for of_task in (of_task for of_task in means.values() if "AP-all" in of_task):
            of_task.update((f"AP{group}", of_task[f"AP-{group}"]) for group in "rcf" if f"AP-{group}" in of_task)
    return {
        "schema": SCHEMA,
        "split": split.name,
        "protocol": "generalized: one run over base and novel names together",
        "metric": _METRICS[metric],
        "evaluator_type": metric,
        **facts,
        "classes": {
            subset: {
                "classes": len(ids),
                "with_ground_truth": sum(objects[category_id] > 0 for category_id in ids),
                "boxes": sum(objects[category_id] for category_id in ids),
            }
            for subset, ids in class_subsets(split).items()
        },
        **{task: _finite(of_task) for task, of_task in means.items()},
        "proposals": _finite(recall),
        "decoder_layers": [
            _finite(class_means(per_class, split, [name for name in ("AP50", "AP") if name in names]))
            for per_class in ((*earlier_layers, figures["bbox"]) if earlier_layers else ())
        ],
        "per_class": _class_rows(split, names, figures, objects),
    }


def to_results(report: dict[str, Any]) -> OrderedDict[str, OrderedDict[str, float]]:
    """Detectron2's results: OrderedDict {"bbox": {...}, "proposals": {...}}, with nan for what does not exist."""
    results = OrderedDict()
    for task in (*TASKS, "proposals"):
        if report[task]:
            results[task] = OrderedDict(
                (key, math.nan if value is None else value) for key, value in report[task].items()
            )
    return results


def format_table(report: dict[str, Any]) -> str:
    """The report as plain text for a terminal or a log.

    Args:
        report: dict of :func:`build_report`, or as read from report.json.

    Returns:
        String of several lines without a final newline.
    """
    setting = read_setting(report)
    lines = [
        f"{report['dataset']}: {report['split']}, {report['protocol']}",
        f"{report['metric']}; {report['detections_per_image']} detections per image",
        f"{report['images']} images, {report['detections']} detections, {report['seconds']:.1f} s",
    ]
    if report.get("scores_tell_nothing"):
        lines.append(f"no AP: {report['scores_tell_nothing']}")
    lines.append(f"setting {setting['letters']}: {meaning(setting['letters'])}")
    lines.append("trained on " + "; ".join(f"{title}: {text}" for title, text in setting_rows(report)[1:]))
    if report["distractors"]:
        lines.append(
            f"{len(report['distractors'])} distractor words, {report['distractor_detections']} detections of them "
            "ignored after the best of each image were selected"
        )
    if absent := report.get("absent_words"):
        lines.append(
            f"{absent['words']} absent words, {absent['false_positives_per_image']:.3f} false positives per image above "
            f"{absent['threshold']:g}"
        )
    for task, title in (("bbox", "boxes"), ("segm", "masks"), ("proposals", "proposals")):
        if report[task]:
            lines += ["", *_task_table(report, task, title)]
    if report.get("decoder_layers"):  # older reports have none
        lines += ["", *_layer_table(report["decoder_layers"])]
    lines.append("classes: with ground truth / in the split; those without are not averaged")
    lines += _interval_lines(report.get("bootstrap"))
    return "\n".join(lines)


def _task_table(report, task, title):
    """Lines of one task: a row for each set of classes, a column for each figure."""
    names = list(OrderedDict.fromkeys(key.partition("-")[0] for key in report[task] if "-" in key))
    title = f"{title}, {read_setting(report)['letters']}"
    lines = [f"{title:<20}" + "".join(f"{name:>9}" for name in names) + f"{'classes':>12}{'objects':>9}"]
    for subset, counts in report["classes"].items():
        values = [report[task].get(f"{name}-{subset}") for name in names]
        if f"{names[0]}-{subset}" not in report[task]:
            continue  # proposals are not evaluated by group
        classes = f"{counts['with_ground_truth']}/{counts['classes']}"
        lines.append(
            f"{subset:<20}" + "".join(f"{_shown(value):>9}" for value in values) + f"{classes:>12}{counts['boxes']:>9}"
        )
    return lines


def _interval_lines(bootstrap):
    """Lines of the intervals of novel, base and all classes."""
    shown = {
        key: ends for key, ends in (bootstrap or {}).get("intervals", {}).items()
        if ends and key.partition("-")[2] in ("novel", "base", "all")
    }  # fmt: skip
    if not shown:
        return []
    texts = ", ".join(f"{key} {low:.2f} to {high:.2f}" for key, (low, high) in shown.items())
    return [f"{bootstrap['level']}% intervals by {bootstrap['resamples']} resamples of the images, boxes: {texts}"]


def _layer_table(layers):
    """Lines of the decoder layers: a row for each, a column for each figure of novel, base and all classes."""
    names = [name for name in layers[0] if name.partition("-")[2] in ("novel", "base", "all")]
    lines = [f"{'decoder layer':<20}" + "".join(f"{name:>12}" for name in names)]
    for number, layer in enumerate(layers, start=1):
        lines.append(f"{number:<20}" + "".join(f"{_shown(layer[name]):>12}" for name in names))
    return lines


def _class_rows(split, names, figures, objects):
    """The entries of "per_class"."""
    rows = []
    for category_id, name, is_base in zip(split.category_ids, split.names, split.base_mask):
        row = {
            "category_id": category_id,
            "name": name,
            "subset": "base" if is_base else "novel",
            "boxes": objects[category_id],
        }
        of_task = {
            task: _finite({figure: figures[task][category_id][figure] for figure in names})
            for task in TASKS
            if task in figures
        }
        rows.append(row | of_task.pop("bbox") | of_task)
    return rows


def _finite(values):
    """The dict with None for nan."""
    return {key: None if math.isnan(value) else value for key, value in values.items()}


def _shown(value):
    return "-" if value is None else f"{value:.2f}"
