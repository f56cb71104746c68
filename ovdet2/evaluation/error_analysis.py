"""Where an open-vocabulary detector loses AP50: kinds of errors, confusions among words, curves, worst and best images.

Pure functions on the columns of :mod:`~ovdet2.evaluation.columns` and the :class:`~ovdet2.evaluation.matching.Matches`
of them. Figures are percent, arithmetic is float64.

Shapes: R detections, G ground-truth boxes, K classes of the split. Names: ``gt_`` ground truth.
"""

import math
from collections import Counter
from typing import Any

import numpy as np

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.matching import LEFT_OUT, OUTCOMES, TRUE, Matches

RECALLS = np.linspace(0, 1, 101)
SUBSETS = ("novel", "base", "all")
ERROR_KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
OTHER = "other"  # subset of a detected category that the split does not have, such as a distractor


def analyse(truth: Truth, detections: Detections, split: Split, matches: Matches, pairs: int = 20) -> dict[str, Any]:
    """All figures of the report about errors.

    Args:
        truth: :class:`~ovdet2.evaluation.columns.Truth`.
        detections: :class:`~ovdet2.evaluation.columns.Detections`, cut to the number per image that was evaluated.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        matches: of :func:`~ovdet2.evaluation.matching.match`.
        pairs: confusions listed at most.

    Returns:
        dict for ``json.dumps`` with :func:`error_split`'s entries, "curves" of :func:`precision_recall`, "confusion" of
        :func:`confusion`, and "image_quality", {image id: (share, boxes)} of :func:`image_quality`.
    """
    return {
        **error_split(truth, detections, split, matches),
        "curves": precision_recall(truth, detections, split, matches),
        "confusion": confusion(truth, detections, split, matches, pairs),
        "image_quality": image_quality(truth, detections, matches),
    }


def error_split(truth: Truth, detections: Detections, split: Split, matches: Matches) -> dict[str, Any]:
    """How many errors there are of each kind, and how much AP50 rises if only errors of one kind are repaired.

    How each kind is repaired (the oracles of TIDE). Classification and localisation: of the errors on one box that
    no true detection matches, the best-scoring one becomes true, in the class of the box, and the others are removed.
    Both, duplicate and background: the detections are removed. Missed: the boxes are removed from the ground truth, so
    a class of which every box is missed stays at 0.

    Returns:
        dict with "AP50" {subset: percent}, "dAP50" {kind: {subset: points of AP50, at least 0}} and "errors"
        {kind: {subset: count}}, over :data:`ERROR_KINDS` and :data:`SUBSETS`, and "left_out", the number of
        detections that are ignored. AP50 is the mean over the subset's classes with ground truth, None without
        one. An error counts for the subset of the class detected, a missed box for its own; only "all" holds the
        errors of categories that are not in the split.
    """
    columns = _Columns(truth, detections, split, matches)
    before = columns.average_precision()
    after = {kind: columns.average_precision(repaired=kind) for kind in ERROR_KINDS}
    means = {subset: _mean(before, classes) for subset, classes in columns.subsets.items()}
    return {
        "AP50": means,
        "dAP50": {
            kind: {subset: _difference(_mean(values, columns.subsets[subset]), means[subset]) for subset in SUBSETS}
            for kind, values in after.items()
        },
        "errors": {kind: columns.error_counts(kind) for kind in ERROR_KINDS},
        "left_out": int((matches.outcome == LEFT_OUT).sum()),
    }


def precision_recall(
    truth: Truth, detections: Detections, split: Split, matches: Matches
) -> dict[str, list[float] | None]:
    """Precision at the 101 recalls 0, 0.01, ..., 1 at IoU 0.5, of COCO: the best at that recall or a larger one.

    Returns:
        {subset: list of 101 floats in [0, 1], the mean over the subset's classes with ground truth, or None}.
    """
    columns = _Columns(truth, detections, split, matches)
    curves = columns.curves()
    return {
        subset: curves[classes].mean(axis=0).tolist() if classes.any() else None
        for subset, classes in columns.subsets.items()
    }


def confusion(truth: Truth, detections: Detections, split: Split, matches: Matches, pairs: int = 20) -> dict[str, Any]:
    """What the detector calls each ground-truth box: the word of the best-scoring detection on it, of any class.

    A detection is on a box when their IoU is at least 0.5 and it is not matched to another box of the same class. In a
    federated data set another word may be right as well.

    Returns:
        dict with "boxes": {subset of the box, "novel" or "base": {"right": count, "novel": called another novel word,
        "base": called another base word, "other": called a word that is not in the split, "nothing": no detection on
        it}} and "pairs": the most frequent confusions, list of {"true", "true_subset", "said", "said_subset",
        "count"}, ties in the order of the split.
    """
    names, subset_of = dict(zip(split.category_ids, split.names)), _subset_of(split)
    boxes = {subset: dict.fromkeys(("right", "novel", "base", OTHER, "nothing"), 0) for subset in ("novel", "base")}
    counts = Counter()
    plain = ~truth.crowd
    predicted = np.where(
        matches.predicted >= 0, detections.category_ids[matches.predicted] if len(detections) else 0, -1
    )
    for true_id, predicted_id, row in zip(
        truth.category_ids[plain].tolist(), predicted[plain].tolist(), matches.predicted[plain].tolist()
    ):
        called = "nothing" if row < 0 else "right" if true_id == predicted_id else subset_of.get(predicted_id, OTHER)
        boxes[subset_of[true_id]][called] += 1
        if called not in ("nothing", "right"):
            counts[true_id, predicted_id] += 1
    rank = {category_id: position for position, category_id in enumerate(split.category_ids)}
    ordered = sorted(counts, key=lambda pair: (-counts[pair], *(rank.get(i, len(rank)) for i in pair), pair))
    return {
        "boxes": boxes,
        "pairs": [
            {
                "true": names[true_id],
                "true_subset": subset_of[true_id],
                "said": names.get(predicted_id, f"category {predicted_id}"),
                "said_subset": subset_of.get(predicted_id, OTHER),
                "count": counts[true_id, predicted_id],
            }
            for true_id, predicted_id in ordered[:pairs]
        ],
    }


def image_quality(truth: Truth, detections: Detections, matches: Matches) -> dict[int, tuple[float, int]]:
    """How good the detections of each image are, without a score threshold.

    Of an image with n boxes (crowds apart) the n best-scoring detections that count are taken: the share of them that
    are true, which is both their precision and their recall, hence their F1. If there are fewer than
    n detections, the missing ones count as false.

    Returns:
        {image id: (share in [0, 1], n)} of the images with a box, by ascending id.
    """
    boxes = Counter(truth.image_ids[~truth.crowd].tolist())
    counted = np.flatnonzero(matches.outcome != LEFT_OUT)
    counted = counted[np.lexsort((-detections.scores[counted], detections.image_ids[counted]))]
    image_ids, starts = np.unique(detections.image_ids[counted], return_index=True)
    true = dict(zip(image_ids.tolist(), np.split(matches.outcome[counted] == TRUE, starts[1:])))
    none = np.zeros(0, dtype=bool)
    return {image_id: (float(true.get(image_id, none)[:n].sum()) / n, n) for image_id, n in sorted(boxes.items())}


def telling_images(quality: dict[int, tuple[float, int]], count: int) -> tuple[list[int], list[int]]:
    """The ids of the worst and of the best images.

    Args:
        quality: of :func:`image_quality`.
        count: of each at most; no image is both.

    Returns:
        (worst, best), each with the most extreme image first: by share, then by the number of boxes, more first, then
        by id.
    """
    count = min(count, len(quality) // 2)
    worst = sorted(quality, key=lambda i: (quality[i][0], -quality[i][1], i))[:count]
    best = sorted(quality.keys() - worst, key=lambda i: (-quality[i][0], -quality[i][1], i))[:count]
    return worst, best


class _Columns:
    """Detections and boxes with classes numbered as in the split, ready for precision and recall.

    ``subsets`` is {subset: [K] bool, the classes of it that have ground truth}.
    """

    def __init__(self, truth, detections, split, matches):
        self._matches, self._scores, self._image_ids = matches, detections.scores, detections.image_ids
        self._predicted = positions_in(split, detections.category_ids)  # R
        self._gt = positions_in(split, truth.category_ids)  # G
        self._counts = np.bincount(self._gt[~truth.crowd], minlength=len(split.category_ids))  # K
        base = np.array(split.base_mask)
        present = self._counts > 0
        self._base = base
        self.subsets = {"novel": present & ~base, "base": present & base, "all": present}

    def curves(self, repaired=None):
        """[K, 101] precision at :data:`RECALLS` when one of the :data:`ERROR_KINDS` is repaired, or none."""
        outcome, predicted, counts = self._matches.outcome, self._predicted, self._counts
        kept, true = outcome != LEFT_OUT, outcome == TRUE
        if repaired == "missed":
            counts = counts - np.bincount(self._gt[self._matches.missed], minlength=len(counts))
        elif repaired is not None:
            errors = outcome == OUTCOMES.index(repaired)
            mended = errors & self._matches.repairs  # never set for both, duplicate and background
            kept, true = kept & ~(errors & ~mended), true | mended
            predicted = np.where(mended, self._gt[self._matches.gt_rows], predicted) if len(self._gt) else predicted
        kept &= predicted >= 0
        return _precision_at_recalls(predicted[kept], self._scores[kept], self._image_ids[kept], true[kept], counts)

    def average_precision(self, repaired=None):
        """[K] AP50 in percent, likewise."""
        return 100 * self.curves(repaired).mean(axis=1)

    def error_counts(self, kind):
        """{subset: errors of a kind}."""
        if kind == "missed":
            classes = self._gt[self._matches.missed]
        else:
            classes = self._predicted[self._matches.outcome == OUTCOMES.index(kind)]
        base = int(self._base[classes[classes >= 0]].sum())
        return {"novel": int((classes >= 0).sum()) - base, "base": base, "all": len(classes)}


def _precision_at_recalls(predicted, scores, image_ids, true, counts):
    """COCO's interpolated precision of each class.

    Args:
        predicted: [R] class position of each detection that counts.
        scores: [R]; equal ones are taken by ascending image id, then in their order.
        image_ids: [R].
        true: [R] bool.
        counts: [K] ground-truth boxes.

    Returns:
        [K, 101] float64; 0 for a class without boxes.
    """
    order = np.lexsort((image_ids, -scores, predicted))
    true = true[order]
    bounds = np.searchsorted(predicted[order], np.arange(len(counts) + 1)).tolist()
    curves = np.zeros((len(counts), len(RECALLS)))
    for position, count in enumerate(counts.tolist()):
        hits = true[bounds[position] : bounds[position + 1]].cumsum()
        if count == 0 or not hits.size or hits[-1] == 0:
            continue
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(hits / count, RECALLS, side="left")
        curves[position] = np.append(precision, 0.0)[reached]
    return curves


def positions_in(split: Split, category_ids: np.ndarray) -> np.ndarray:
    """[N] int64 positions in the split of dataset category ids, -1 for those it does not have."""
    ids = np.asarray(split.category_ids)
    order = ids.argsort()
    at = np.searchsorted(ids[order], category_ids).clip(max=len(ids) - 1)
    positions = order[at]
    return np.where(ids[positions] == category_ids, positions, -1)


def _subset_of(split):
    """{dataset category id: "base" or "novel"}."""
    return dict(zip(split.category_ids, ("base" if is_base else "novel" for is_base in split.base_mask)))


def _mean(values, classes):
    return math.fsum(values[classes]) / int(classes.sum()) if classes.any() else None


def _difference(after, before):
    return None if after is None else after - before
