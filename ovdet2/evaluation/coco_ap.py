"""COCO box average precision of one class, and its means over sets of classes.

Shapes: G ground-truth boxes, R detections, of one class and all images. Boxes are XYXY in pixels of the original image.
"""

import math

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

_CATEGORY = 1  # the one class of an evaluation, as the engine sees it


def class_average_precision(gt_image_ids, gt_boxes, gt_crowd, dt_image_ids, dt_boxes, dt_scores, max_detections=100):
    """AP over IoU 0.50:0.05:0.95 and AP50, 101 recall points, all areas.

    COCO averages over classes what is computed for each alone, so evaluating class by class is exact and holds
    only one class's boxes as Python objects at a time.

    Args:
        gt_image_ids: [G] int64.
        gt_boxes: [G, 4].
        gt_crowd: [G] bool; a detection on a crowd region counts neither way.
        dt_image_ids: [R] int64; within an image equal scores keep their order.
        dt_boxes: [R, 4].
        dt_scores: [R].
        max_detections: most detections counted in one image.

    Returns:
        (AP, AP50) in percent; (nan, nan) without a ground-truth box that is not crowd.
    """
    gt_crowd = np.asarray(gt_crowd, dtype=bool)
    if not (~gt_crowd).any():
        return math.nan, math.nan
    if len(dt_image_ids) == 0:
        return 0.0, 0.0
    images = [{"id": image_id} for image_id in np.union1d(gt_image_ids, dt_image_ids).tolist()]
    engine = COCOeval_faster(
        _as_coco(images, gt_image_ids, gt_boxes, iscrowd=gt_crowd.astype(int)),
        _as_coco(images, dt_image_ids, dt_boxes, score=np.asarray(dt_scores, dtype=np.float64)),
        "bbox",
    )
    engine.params.areaRng, engine.params.areaRngLbl = [[0, 1e10]], ["all"]
    engine.params.maxDets = [max_detections]
    engine.evaluate()
    engine.accumulate()
    precision = engine.eval["precision"]  # thresholds x recalls x 1 class x 1 area x 1 limit
    return 100.0 * float(precision.mean()), 100.0 * float(precision[0].mean())


def mean_of(values):
    """Mean of the values that are not nan; nan when there is none."""
    values = [value for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


def _as_coco(images, image_ids, boxes, **columns):
    """The engine's data set of one class; ``columns`` are further [G] or [R] arrays by their COCO name."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    sizes = boxes[:, 2:] - boxes[:, :2]
    columns = {
        # Numbered from 1: the engine's matching reads id 0 as "unmatched".
        "id": np.arange(1, len(boxes) + 1),
        "category_id": np.full(len(boxes), _CATEGORY),
        "image_id": np.asarray(image_ids),
        "bbox": np.concatenate([boxes[:, :2], sizes], axis=1),
        "area": sizes.prod(axis=1),
        **columns,
    }
    rows = zip(*(column.tolist() for column in columns.values()))
    annotations = [dict(zip(columns, row)) for row in rows]
    return COCO({"images": images, "annotations": annotations, "categories": [{"id": _CATEGORY}]})
