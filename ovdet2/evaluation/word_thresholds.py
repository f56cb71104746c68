"""One score threshold for each word: the one with the best F1 on a validation set.

True and false positives are those of :func:`~ovdet2.evaluation.matching.match` at IoU 0.5; detections that the metric
ignores do not count. Arithmetic is float64.

Shapes: R detections, K words of the split, C groups of detections. Names: ``gt_`` ground truth.
"""

from dataclasses import dataclass

import numpy as np

from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import DataError
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.error_analysis import positions_in
from ovdet2.evaluation.matching import LEFT_OUT, TRUE, Matches

MIN_OBJECTS = 10


@dataclass(frozen=True)
class WordThresholds:
    """Thresholds of the words of a split; detections with a higher score count.

    Attributes:
        general: the threshold with the best F1 over the detections of all words together.
        values: [K] float64, the threshold of each word, or ``general``.
        chosen: [K] bool, whether the word has a threshold from its own detections.
        general_f1: [K] float64, F1 of each word at ``general``, in [0, 1]; nan for words without objects.
        f1: [K] float64, F1 at ``values``.
    """

    general: float
    values: np.ndarray
    chosen: np.ndarray
    general_f1: np.ndarray
    f1: np.ndarray


def choose_thresholds(
    truth: Truth, detections: Detections, split: Split, matches: Matches, min_objects: int = MIN_OBJECTS
) -> WordThresholds:
    """The threshold with the best F1 for each word, or the general one.

    F1 = 2 TP / (detections above the threshold + objects). A threshold lies halfway between the lowest score that
    counts and the next lower one of the word (0 if there is none). Of equal F1 the highest threshold is chosen. A word has
    the general threshold if it has fewer than ``min_objects`` objects, crowds apart, or no correct detection.

    Args:
        truth, detections: of one evaluation.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        matches: of :func:`~ovdet2.evaluation.matching.match`.
        min_objects: at least 1.

    Raises:
        DataError: no detection is correct.
    """
    count = len(split.names)
    words = positions_in(split, detections.category_ids)
    kept = (matches.outcome != LEFT_OUT) & (words >= 0)
    words, true = words[kept], (matches.outcome == TRUE)[kept]
    scores = np.asarray(detections.scores, dtype=np.float64)[kept]
    if not true.any():
        raise DataError("no detection is correct at IoU 0.5: evaluate trained weights.")
    gt_words = positions_in(split, truth.category_ids)[~truth.crowd]
    objects = np.bincount(gt_words[gt_words >= 0], minlength=count)
    general = float(best_thresholds(np.zeros_like(words), scores, true, objects.sum(keepdims=True))[0][0])
    own, best = best_thresholds(words, scores, true, objects)
    chosen = (objects >= max(1, min_objects)) & (best > 0)
    values = np.where(chosen, own, general)
    return WordThresholds(
        general,
        values,
        chosen,
        f1_at(np.full(count, general), words, scores, true, objects),
        f1_at(values, words, scores, true, objects),
    )


def best_thresholds(
    groups: np.ndarray, scores: np.ndarray, true: np.ndarray, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The threshold of each group with the best F1.

    Args:
        groups: [R] int64 in [0, C).
        scores: [R] float64.
        true: [R] bool.
        objects: [C] ground-truth objects.

    Returns:
        (thresholds [C] float64, their F1 [C] float64); nan and 0 for a group without detections.
    """
    thresholds, best = np.full(len(objects), np.nan), np.zeros(len(objects))
    if not len(groups):
        return thresholds, best
    order = np.lexsort((-scores, groups))
    groups, scores, true = groups[order], scores[order], true[order]
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    segment = np.cumsum(np.r_[False, groups[1:] != groups[:-1]])
    hits = np.cumsum(true)
    rank = np.arange(1, len(groups) + 1) - starts[segment]
    hits = hits - (hits[starts] - true[starts])[segment]
    f1 = 2 * hits / (rank + objects[groups])
    last = np.r_[groups[1:] != groups[:-1], True]
    below = np.where(last, 0.0, np.r_[scores[1:], 0.0])  # the next lower score of the group
    f1[~last & (below == scores)] = -1  # equal scores are above a threshold together
    highest = np.maximum.reduceat(f1, starts)
    first = np.flatnonzero(f1 == highest[segment])
    _, where = np.unique(segment[first], return_index=True)
    rows = first[where]  # of each group with detections, the highest score with the best F1
    thresholds[groups[rows]] = (scores[rows] + below[rows]) / 2
    best[groups[rows]] = f1[rows]
    return thresholds, best


def f1_at(
    thresholds: np.ndarray, groups: np.ndarray, scores: np.ndarray, true: np.ndarray, objects: np.ndarray
) -> np.ndarray:
    """F1 of each group at its threshold [C], [C] float64; nan for groups without objects. See :func:`best_thresholds`."""
    above = scores > thresholds[groups]
    found = np.bincount(groups[above], minlength=len(objects))
    hits = np.bincount(groups[above & true], minlength=len(objects))
    return np.where(objects > 0, 2 * hits / np.maximum(found + objects, 1), np.nan)
