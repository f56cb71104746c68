"""Precision and recall of detections without meaningful scores, for which AP does not exist.

AP is the area below the curve of precision and recall that a score threshold draws. Detections with one score, or with none,
have no such curve: only one precision and one recall, at each IoU threshold.
"""

import math

import numpy as np

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation.bootstrap import match_classes
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.federation import Federation

PRECISION_RECALL = ("P50", "R50", "P75", "R75", "P", "R")
WITHOUT_AP = (
    "precision (P) and recall (R) of all detections at IoU 0.50 and 0.75, and their means over IoU 0.50:0.05:0.95; precision "
    "is averaged over the classes with detections"
)


def precision_and_recall(
    truth: Truth, detections: Detections, split: Split, metric: str
) -> dict[int, dict[str, float]]:
    """Precision and recall of the boxes of each class, all detections counted; those of an image match in their order.

    Args:
        truth, detections: of one data set, the detections with one score.
        split: its :class:`~ovdet2.data.datasets.coco_json.Split`.
        metric: "ov_coco", "ov_voc" or "ov_lvis", whose rules decide what is ignored.

    Returns:
        {category id: {figure of :data:`PRECISION_RECALL`: percent}}; nan without ground truth, and for the precision of a
        class without detections that count.
    """
    federation = Federation(truth.images) if metric == "ov_lvis" else None
    figures = {category_id: dict.fromkeys(PRECISION_RECALL, math.nan) for category_id in split.category_ids}
    ids, crowds = split.category_ids, metric != "ov_voc"
    for category_id, matches in match_classes(truth, detections, ids, "bbox", federation, crowds):
        true, counted = matches.true.sum(axis=1), (~matches.ignored).sum(axis=1)
        precision = np.divide(100.0 * true, counted, out=np.full(len(true), math.nan), where=counted > 0)
        recall = 100.0 * true / len(matches.gt_images)
        for letter, values in (("P", precision), ("R", recall)):
            named = {f"{letter}50": values[0], f"{letter}75": values[5], letter: values.mean()}
            figures[category_id] |= {name: float(value) for name, value in named.items()}
    return figures
