"""Average precision and recall of one class at a time, by the rules of COCO or of LVIS, and means over classes.

COCO and LVIS average over classes what is computed for each separately, so evaluating class by class is exact, and only one
class's boxes or masks are Python objects at a time.

Shapes: G ground-truth objects, R detections. Boxes are XYXY in pixels of the original image.
Names: ``gt_`` ground truth, ``_xyxy`` boxes (left, top, right, bottom).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCOeval_faster
from faster_coco_eval import mask as mask_api
from tqdm import tqdm

from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.federation import Federation

_CATEGORY = 1  # the one class of an evaluation, as the engine sees it
_MANY = 300_000  # detections of a class whose area ranges are evaluated one by one
_AREAS = ("", "s", "m", "l")  # the engine's area ranges: all, up to 32², up to 96², larger, in square pixels


def evaluate_classes(
    truth: Truth,
    detections: Detections,
    category_ids: Sequence[int],
    task: str = "bbox",
    limits: Sequence[int] = (100,),
    federation: Federation | None = None,
    crowds: bool = True,
) -> dict[int, dict[str, float]]:
    """Figures of each class over all images.

    Args:
        truth: :class:`~ovdet2.evaluation.columns.Truth`; a detection on a crowd region is ignored. With
            ``task`` "segm" it has segmentations.
        detections: :class:`~ovdet2.evaluation.columns.Detections`, cut to the best of each image already; equal scores
            keep their order, images go by ascending id. With ``task`` "segm" they have masks.
        category_ids: the classes to evaluate, dataset category ids.
        task: "bbox" or "segm": the shapes whose overlap counts, and whose area makes a detection small, medium or
            large (ground truth is always classed by its annotated area).
        limits: ascending numbers of detections of a class counted in one image; AP is that of the last one.
        federation: :class:`~ovdet2.evaluation.federation.Federation` for the rules of LVIS, None for those of COCO.
        crowds: the regions of ``truth.many`` hold many objects, so a detection is on one by the share of the detection
            that lies in it (COCO). False: each is one object whose detections are ignored, and IoU decides (VOC).

    Returns:
        {category id: {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR@<limit>" of each limit, "ARs", "ARm", "ARl"}}, in
        percent: 101 recall points, IoU 0.50:0.05:0.95 unless the name gives another. nan without ground
        truth that is not crowd, of that size for s, m, l.
    """
    figures = dict.fromkeys(category_ids, dict.fromkeys(_names(limits), math.nan))
    for category_id, gt, found in class_columns(truth, detections, category_ids, task, federation):
        figures[category_id] = _figures_of(_evaluate(gt, found, task, limits, crowds), limits)
    return figures


def class_columns(
    truth: Truth,
    detections: Detections,
    category_ids: Sequence[int],
    task: str = "bbox",
    federation: Federation | None = None,
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """The ground truth and the detections that count for each class that has ground truth other than crowds.

    Args:
        truth, detections, category_ids, task, federation: as of :func:`evaluate_classes`.

    Yields:
        (category id, columns of the ground truth, columns of the detections): dicts sorted by image id, the detections
        of an image by descending score, with "image_ids" and "shapes" (XYWH boxes or run-length codes); of the truth
        "iscrowd" and "by_share"; of the detections "score" and, in a federated data set, "lvis_mark": those that are
        ignored if they match nothing.
    """
    truth_rows, found_rows = _RowsByClass(truth.category_ids), _RowsByClass(detections.category_ids)
    for category_id in tqdm(category_ids, desc=f"evaluating {task}", unit="class", disable=None, leave=False):
        rows, found = truth_rows.of(category_id), found_rows.of(category_id)
        if truth.crowd[rows].all():  # True for no rows, too
            continue
        exempt = ()
        if federation is not None:
            evaluated, exempt = federation.images_of(category_id, truth.image_ids[rows])
            found = found[np.isin(detections.image_ids[found], evaluated)]
        yield category_id, _truth_of(truth, rows, task), _found_of(detections, found, task, exempt)


def image_overlaps(gt: dict[str, Any], found: dict[str, Any], image_id: int, crowds: bool) -> np.ndarray:
    """Overlap of the detections and the ground truth of one class in one image.

    Args:
        gt, found: columns of :func:`class_columns`.
        image_id: of an image with both.
        crowds: as of :func:`evaluate_classes`.

    Returns:
        [R, G] float64: IoU, or the share of the detection that lies in a crowd.
    """
    of_gt, of_found = (slice_of(columns["image_ids"], image_id) for columns in (gt, found))
    by_share = (gt["by_share"][of_gt] & crowds).astype(int)
    return np.asarray(mask_api.iou(found["shapes"][of_found], gt["shapes"][of_gt], by_share), dtype=np.float64)


def mean_of(values: Iterable[float]) -> float:
    """Mean of the values that are not nan; nan when there is none."""
    values = [value for value in values if not math.isnan(value)]
    return math.fsum(values) / len(values) if values else math.nan


def _evaluate(truth, found, task, limits, crowds):
    """The engine's precision and recall of one class; of many detections one area range after the other.

    The engine holds the matches of all its ranges, some 360 bytes for a detection, so this bounds the memory.
    """
    parts = []
    for area in range(len(_AREAS)) if len(found["score"]) > _MANY else [None]:
        engine = _OneClass(truth, found, task, limits, crowds)
        if area is not None:
            engine.params.areaRng = [engine.params.areaRng[area]]
        engine.evaluate()
        parts.append((engine.eval["precision"], engine.eval["recall"]))
    precisions, recalls = zip(*parts)
    return {"precision": np.concatenate(precisions, axis=3), "recall": np.concatenate(recalls, axis=2)}


class _RowsByClass:
    """The row numbers of each category id in a column, ascending."""

    def __init__(self, category_ids):
        self._order = np.argsort(category_ids, kind="stable")
        self._sorted = np.asarray(category_ids)[self._order]

    def of(self, category_id):
        return self._order[slice_of(self._sorted, category_id)]


class _OneClass(COCOeval_faster):
    """The library's matching and accumulation, fed with columns instead of two COCO data sets of one dict per box.

    Two methods are replaced: :meth:`_prepare` passes the annotations to the C++ part, which reads only id, score, area
    and three flags; :meth:`computeIoU` computes the overlaps of one image.

    Args:
        truth, found: dicts of columns sorted by image, those of an image by descending score: image_ids, shapes (XYWH
            boxes or run-length codes), of the truth by_share, and what :meth:`_prepare` passes on.
        task, limits, crowds: as of :func:`evaluate_classes`.
    """

    def __init__(self, truth, found, task, limits, crowds):
        super().__init__(None, None, task, print_function=lambda *_: None)
        self._truth, self._found, self._crowds = truth, found, crowds
        self.params.imgIds = list(np.union1d(truth["image_ids"], found["image_ids"]))
        self.params.catIds, self.params.maxDets = [_CATEGORY], list(limits)
        shared = np.intersect1d(truth["image_ids"], found["image_ids"])
        self._nonempty_iou_pairs = {(image_id, _CATEGORY) for image_id in shared.tolist()}

    def _prepare(self):
        for columns, target in ((self._truth, self.gt_dataset), (self._found, self.dt_dataset)):
            keys = [key for key in columns if key not in ("image_ids", "shapes", "by_share")]
            rows = zip(*(columns[key].tolist() for key in keys))
            # Numbered from 1: the matching reads id 0 as "unmatched".
            for number, (image_id, row) in enumerate(zip(columns["image_ids"].tolist(), rows), start=1):
                target.append_ref(image_id, _CATEGORY, {"id": number, **dict(zip(keys, row))})

    def computeIoU(self, imgId, catId):
        return image_overlaps(self._truth, self._found, imgId, self._crowds)


def slice_of(ascending: np.ndarray, value: int) -> slice:
    """Where a value stands in an ascending array. (The next integer is no end: the largest int64 has none.)"""
    return slice(*(np.searchsorted(ascending, value, side) for side in ("left", "right")))


def _truth_of(truth, rows, task):
    """The engine's columns of some annotations."""
    rows = rows[np.argsort(truth.image_ids[rows], kind="stable")]
    image_ids, crowd = truth.image_ids[rows], truth.crowd[rows].astype(int)
    if task == "bbox":
        shapes = _xywh(truth.boxes_xyxy[rows])
    else:
        sizes = [(truth.images[image_id]["width"], truth.images[image_id]["height"]) for image_id in image_ids.tolist()]
        shapes = [
            mask_api.segmToRle(truth.segmentations[row], width, height) for row, (width, height) in zip(rows, sizes)
        ]
    return {
        "image_ids": image_ids,
        "shapes": shapes,
        "area": truth.areas[rows],
        "iscrowd": crowd,
        "ignore": crowd,
        "by_share": truth.many[rows],
    }


def _found_of(detections, rows, task, exempt):
    """The engine's columns of some detections; on the images ``exempt`` those that match nothing are ignored."""
    rows = rows[np.lexsort((-detections.scores[rows], detections.image_ids[rows]))]
    if task == "bbox":
        shapes = _xywh(detections.boxes_xyxy[rows])
        areas = shapes[:, 2:].prod(axis=1)
    else:
        shapes = [detections.masks[row] for row in rows.tolist()]
        areas = np.asarray(mask_api.area(shapes) if shapes else [], dtype=np.float64)
    columns = {
        "image_ids": detections.image_ids[rows],
        "shapes": shapes,
        "score": detections.scores[rows].astype(np.float64),
        "area": areas,
    }
    if len(exempt):
        columns["lvis_mark"] = np.isin(columns["image_ids"], exempt)
    return columns


def _xywh(boxes_xyxy):
    boxes = np.array(boxes_xyxy, dtype=np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _names(limits):
    return ["AP50", "AP", "AP75", "APs", "APm", "APl", *(f"AR@{limit}" for limit in limits), "ARs", "ARm", "ARl"]


def _figures_of(result, limits):
    """Percentages of the engine's arrays, which hold -1 without ground truth."""
    precision = result["precision"][:, :, 0, :, -1]  # thresholds x recalls x areas
    recall = result["recall"][:, 0]  # thresholds x areas x limits
    values = {"AP50": precision[0, :, 0], "AP75": precision[5, :, 0]}
    values |= {f"AP{size}": precision[:, :, area] for area, size in enumerate(_AREAS)}
    values |= {f"AR@{limit}": recall[:, 0, position] for position, limit in enumerate(limits)}
    values |= {f"AR{size}": recall[:, area, -1] for area, size in enumerate(_AREAS) if size}
    return {
        name: 100.0 * float(values[name].mean()) if values[name].min() >= 0 else math.nan for name in _names(limits)
    }
