"""Every detection explained against the ground truth at IoU 0.5: true, ignored, or an error of one of five kinds.

The kinds and their order are those of TIDE (Bolya et al., ECCV 2020) as in its authors' tidecv 1.0.1, with one
difference: a detection that the metric ignores (on a crowd; by LVIS's federated rule) is no error here, while tidecv
explains it as well.

Shapes: R detections, G ground-truth boxes, of the data set or of one image. Boxes are XYXY in pixels.
Names: ``gt_`` ground truth, ``_xyxy`` boxes (left, top, right, bottom).
"""

from dataclasses import dataclass

import numpy as np

from ovdet2.errors import DataError
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.proposal_recall import pairwise_iou

FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.1

OUTCOMES = ("true", "left out", "classification", "localisation", "both", "duplicate", "background")
TRUE, LEFT_OUT, CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(len(OUTCOMES))


@dataclass(frozen=True)
class Matches:
    """The outcome of each detection and each ground-truth box, in the order of the columns given.

    Attributes:
        outcome: [R] int8, index into :data:`OUTCOMES`.
        gt_rows: [R] int64, row of the box that a true detection is matched to, or that a classification or localisation
            error would be matched to without its error; -1 for the others.
        repairs: [R] bool, the best-scoring of the classification and localisation errors on one unmatched box: it
            becomes true when its kind of error is repaired, the others are removed.
        missed: [G] bool, not matched, and not matched by repairing an error either; False for crowds.
        predicted: [G] int64, row of the best-scoring detection of any class that overlaps the box with IoU >= 0.5 and
            is not matched to another box; -1 if there is none, and for crowds.
    """

    outcome: np.ndarray
    gt_rows: np.ndarray
    repairs: np.ndarray
    missed: np.ndarray
    predicted: np.ndarray


def match(truth: Truth, detections: Detections, crowds: bool = True) -> Matches:
    """Explain all detections of a data set.

    By descending score, each detection is matched to the free box of its class that it overlaps most, if the IoU
    is at least 0.5. An unmatched one is ignored if the metric ignores it: when half of it lies on a crowd of its class,
    and in a federated data set (images with "neg_category_ids") when its class is neither annotated nor verified absent
    in the image, or not annotated exhaustively. All others are errors, of the first kind that fits:

    - localisation: its largest IoU with a box of its class is within [0.1, 0.5];
    - classification: it overlaps a box of another class with IoU >= 0.5;
    - duplicate: it overlaps a box of its class, matched to a better detection, with IoU >= 0.5;
    - background: no box with IoU above 0.1;
    - both (class and place are wrong): the rest.

    Args:
        truth: :class:`~ovdet2.evaluation.columns.Truth`.
        detections: :class:`~ovdet2.evaluation.columns.Detections`, in any order; equal scores of an image keep theirs.
        crowds: as of :func:`~ovdet2.evaluation.coco_ap.evaluate_classes`.

    Returns:
        :class:`Matches`.

    Raises:
        DataError: a detection in an image that the data set does not have.
    """
    matches = Matches(
        outcome=np.full(len(detections), BACKGROUND, dtype=np.int8),
        gt_rows=np.full(len(detections), -1, dtype=np.int64),
        repairs=np.zeros(len(detections), dtype=bool),
        missed=~truth.crowd,
        predicted=np.full(len(truth.crowd), -1, dtype=np.int64),
    )
    for image_id, rows, gt_rows in _by_image(truth, detections):
        plain = gt_rows[~truth.crowd[gt_rows]]
        boxes, classes = detections.boxes_xyxy[rows], detections.category_ids[rows]
        overlaps = pairwise_iou(boxes, truth.boxes_xyxy[plain])  # R x G
        same = classes[:, None] == truth.category_ids[plain]  # R x G
        found = _assign(overlaps * same)
        left_out = (found < 0) & _not_counted(truth, image_id, gt_rows, boxes, classes, crowds)
        outcome, target = _explain(overlaps, same, found, left_out)
        matches.outcome[rows] = outcome
        if len(plain):
            _record_boxes(matches, rows, plain, overlaps, found, outcome, target)
    return matches


def _by_image(truth, detections):
    """Yield (image id, rows of its detections by descending score, rows of its boxes) of each image with detections."""
    order = np.lexsort((-detections.scores, detections.image_ids))
    gt_order = np.argsort(truth.image_ids, kind="stable")
    gt_image_ids = truth.image_ids[gt_order]
    image_ids, starts = np.unique(detections.image_ids[order], return_index=True)
    gt_starts, gt_ends = (np.searchsorted(gt_image_ids, image_ids, side) for side in ("left", "right"))
    for image_id, rows, gt_start, gt_end in zip(
        image_ids.tolist(), np.split(order, starts[1:]), gt_starts.tolist(), gt_ends.tolist()
    ):
        if image_id not in truth.images:
            raise DataError(f"image {image_id} has detections but is not in the data set: give the predictions of it.")
        yield image_id, rows, gt_order[gt_start:gt_end]


def _assign(overlaps):
    """Column of the box that each detection is matched to, [R] int64, -1 for none.

    Args:
        overlaps: [R, G] IoU with the boxes of the detection's class, 0 with others; detections by descending score.
    """
    found = np.full(len(overlaps), -1, dtype=np.int64)
    free = overlaps.copy()
    for row in np.flatnonzero((overlaps >= FOREGROUND_IOU).any(axis=1)):
        column = free[row].argmax()
        if free[row, column] >= FOREGROUND_IOU:
            found[row] = column
            free[:, column] = 0
    return found


def _not_counted(truth, image_id, gt_rows, boxes, classes, crowds):
    """[R] bool: the metric ignores the detection if it is matched to no box."""
    regions = gt_rows[truth.crowd[gt_rows]]
    overlaps = pairwise_iou(boxes, truth.boxes_xyxy[regions])  # R x regions
    if crowds:
        overlaps = np.where(truth.many[regions], _covered(boxes, truth.boxes_xyxy[regions]), overlaps)
    on_region = overlaps >= FOREGROUND_IOU
    not_counted = (on_region & (classes[:, None] == truth.category_ids[regions])).any(axis=1)
    record = truth.images[image_id]
    if "neg_category_ids" in record:
        verified = np.union1d(truth.category_ids[gt_rows], np.asarray(record["neg_category_ids"], dtype=np.int64))
        not_counted |= ~np.isin(classes, verified) | np.isin(classes, record["not_exhaustive_category_ids"])
    return not_counted


def _covered(boxes, regions):
    """Share of each box's area inside of each region, [R, regions] float64: COCO's overlap with a crowd."""
    a, b = np.asarray(boxes, dtype=np.float64)[:, None], regions[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared, area = sides.clip(min=0).prod(axis=-1), (a[..., 2:] - a[..., :2]).prod(axis=-1)
    return np.divide(shared, area, out=np.zeros_like(shared), where=area > 0)


def _explain(overlaps, same, found, left_out):
    """The outcome of each detection of an image and the box that it concerns.

    Args:
        overlaps: [R, G] IoU.
        same: [R, G] bool, the classes agree.
        found: [R] column found, -1 for none.
        left_out: [R] bool.

    Returns:
        (outcome [R] int64, column [R] int64: of the box that it is or would be matched to; -1 for the other outcomes).
    """
    if not overlaps.shape[1]:
        return np.where(left_out, LEFT_OUT, BACKGROUND), found
    used = np.isin(np.arange(overlaps.shape[1]), found)
    of_class, of_others = overlaps * same, overlaps * ~same
    best = of_class.max(axis=1)
    rules = (
        (found >= 0, TRUE),
        (left_out, LEFT_OUT),
        ((best >= BACKGROUND_IOU) & (best <= FOREGROUND_IOU), LOCALISATION),
        (of_others.max(axis=1) >= FOREGROUND_IOU, CLASSIFICATION),
        ((of_class * used).max(axis=1) >= FOREGROUND_IOU, DUPLICATE),
        (overlaps.max(axis=1) <= BACKGROUND_IOU, BACKGROUND),
    )
    outcome = np.select([fits for fits, _ in rules], [kind for _, kind in rules], BOTH)
    wanted = {LOCALISATION: of_class.argmax(axis=1), CLASSIFICATION: of_others.argmax(axis=1)}
    return outcome, np.select([outcome == kind for kind in wanted], list(wanted.values()), found)


def _record_boxes(matches, rows, gt_rows, overlaps, found, outcome, target):
    """Fill the entries of ``matches`` for the ground-truth boxes of an image: gt_rows, repairs, missed and predicted.

    Args:
        rows, gt_rows: of the image's detections by descending score and of its boxes, crowds apart.
        overlaps, found: as in :func:`_explain`.
        outcome, target: of :func:`_explain`.
    """
    matches.gt_rows[rows] = np.where(target >= 0, gt_rows[target], -1)
    used = np.isin(np.arange(len(gt_rows)), found)
    repairable = np.flatnonzero(np.isin(outcome, (CLASSIFICATION, LOCALISATION)) & ~used[target])
    columns, first = np.unique(target[repairable], return_index=True)  # the first is the one of the best score
    matches.repairs[rows[repairable[first]]] = True
    reached = used.copy()
    reached[columns] = True
    matches.missed[gt_rows] = ~reached
    votes = (overlaps >= FOREGROUND_IOU) & ((found[:, None] < 0) | (found[:, None] == np.arange(len(gt_rows))))
    matches.predicted[gt_rows] = np.where(votes.any(axis=0), rows[votes.argmax(axis=0)], -1)
