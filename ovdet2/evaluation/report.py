"""What an evaluation says: ``report.json`` (schema "ovdet2/report/1"), Detectron2's results dict, and a printed table.

All figures are percent. A figure that does not exist (no ground truth) is null in the json and nan in the results.
"""

import math
from collections import OrderedDict

from ovdet2.evaluation.coco_ap import mean_of

SCHEMA = "ovdet2/report/1"
SUBSETS = ("novel", "base", "all")


def class_subsets(split):
    """Dict of report row to the dataset category ids it averages over: novel, base, all, then the split's groups."""
    base = len(split.base)
    subsets = {"novel": split.category_ids[base:], "base": split.category_ids[:base], "all": split.category_ids}
    return subsets | {group: tuple(ids) for group, ids in split.groups.items()}


def class_means(per_class, split):
    """Means over the classes that have ground truth.

    Args:
        per_class: {category id: (AP, AP50)} in percent, nan for a class without ground truth.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.

    Returns:
        OrderedDict "AP50-novel", "AP50-base", "AP50-all", "AP50-<group>", ..., then the same of AP.
    """
    means = OrderedDict()
    for column, metric in ((1, "AP50"), (0, "AP")):
        for subset, ids in class_subsets(split).items():
            means[f"{metric}-{subset}"] = mean_of(per_class[category_id][column] for category_id in ids)
    return means


def build_report(split, per_class, boxes_per_class, recall, facts):
    """The content of report.json.

    Args:
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        per_class: {category id: (AP, AP50)}.
        boxes_per_class: {category id: ground-truth boxes that are not crowd}.
        recall: {"AR@100-novel": percent, ...}; empty when the model gave no proposals.
        facts: further entries: dataset, images, detections_per_image, seconds, versions, ...

    Returns:
        dict for ``json.dumps``; no nan in it.
    """
    subset_of = dict(zip(split.category_ids, ("base" if is_base else "novel" for is_base in split.base_mask)))
    report = {
        "schema": SCHEMA,
        "split": split.name,
        "protocol": "generalized: one run over base and novel names together",
        "metric": "COCO box AP, all areas; AP50 at IoU 0.50, AP over IoU 0.50:0.05:0.95; AR over the same IoUs",
        **facts,
        "classes": {
            subset: {
                "classes": len(ids),
                "with_ground_truth": sum(boxes_per_class[category_id] > 0 for category_id in ids),
                "boxes": sum(boxes_per_class[category_id] for category_id in ids),
            }
            for subset, ids in class_subsets(split).items()
        },
        "bbox": {key: _finite_or_none(value) for key, value in class_means(per_class, split).items()},
        "proposals": {key: _finite_or_none(value) for key, value in recall.items()},
        "per_class": [
            {
                "category_id": category_id,
                "name": name,
                "subset": subset_of[category_id],
                "boxes": boxes_per_class[category_id],
                "AP": _finite_or_none(per_class[category_id][0]),
                "AP50": _finite_or_none(per_class[category_id][1]),
            }
            for category_id, name in zip(split.category_ids, split.names)
        ],
    }
    return report


def to_results(report):
    """Detectron2's results: OrderedDict {"bbox": {...}, "proposals": {...}}, with nan for what does not exist."""
    results = OrderedDict()
    for task in ("bbox", "proposals"):
        if report[task]:
            results[task] = OrderedDict(
                (key, math.nan if value is None else value) for key, value in report[task].items()
            )
    return results


def format_table(report):
    """The report as plain text for a terminal or a log.

    Args:
        report: dict of :func:`build_report`, or as read from report.json.

    Returns:
        String of several lines without a final newline.
    """
    limits = sorted({int(key.split("-")[0].removeprefix("AR@")) for key in report["proposals"]})
    columns = ["AP50", "AP", *(f"AR@{limit}" for limit in limits)]
    lines = [
        f"{report['dataset']}: {report['split']}, {report['protocol']}",
        f"{report['metric']}; {report['detections_per_image']} detections per image",
        f"{report['images']} images, {report['detections']} detections, {report['seconds']:.1f} s",
        "",
        f"{'':<20}" + "".join(f"{column:>8}" for column in columns) + f"{'classes':>12}{'boxes':>9}",
    ]
    figures = {**report["bbox"], **report["proposals"]}
    for subset, counts in report["classes"].items():
        cells = "".join(f"{_shown(figures.get(f'{column}-{subset}')):>8}" for column in columns)
        classes = f"{counts['with_ground_truth']}/{counts['classes']}"
        lines.append(f"{subset:<20}{cells}{classes:>12}{counts['boxes']:>9}")
    lines.append("classes: with ground truth / in the split; those without are in no mean")
    return "\n".join(lines)


def _finite_or_none(value):
    return None if math.isnan(value) else value


def _shown(value):
    return "-" if value is None else f"{value:.2f}"
