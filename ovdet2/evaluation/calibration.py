"""Calibration: whether detections of score s are correct in a share s of the cases.

A detection is correct if the evaluator's greedy matching at IoU 0.5 assigns it a ground-truth box
(:func:`~ovdet2.evaluation.matching.match`). Detections that the metric ignores, and those with a score below a floor, do
not count. Arithmetic is float64.

Shapes: R detections.
"""

from typing import Any

import numpy as np

from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import UsageError
from ovdet2.evaluation.columns import Detections
from ovdet2.evaluation.error_analysis import SUBSETS, positions_in
from ovdet2.evaluation.matching import LEFT_OUT, TRUE, Matches

FLOOR, BINS = 0.05, 15
BINNINGS = ("mass", "width")


def calibration(
    detections: Detections,
    split: Split,
    matches: Matches,
    floor: float = FLOOR,
    bins: int = BINS,
    binning: str = "mass",
) -> dict[str, Any]:
    """Reliability curves and expected calibration errors of novel, base and all words.

    Args:
        detections: as evaluated.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        matches: of :func:`~ovdet2.evaluation.matching.match`.
        floor: smallest score that counts, in [0, 1).
        bins: largest number of bins, at least 1.
        binning: "mass", bins of equal numbers of detections (equal scores share a bin, so there may be fewer bins), or
            "width", bins of equal width from 0 to 1.

    Returns:
        dict for ``json.dumps`` with "floor", "bins", "binning" and "subsets", {subset: {"detections": count,
        "correct": count, "ECE": percent or None, "over_confidence": percent or None, "curve": [{"count", "score",
        "precision"}, ...]}}. A curve has the bins with detections by ascending score: their number, their mean score and
        the share of correct ones, in [0, 1]. ECE is the mean over detections of |precision - score| of their bin,
        over_confidence the mean score minus the precision of all.

    Raises:
        UsageError: a floor, a number of bins or a binning outside of its range.
    """
    if not 0 <= floor < 1 or bins < 1 or binning not in BINNINGS:
        raise UsageError(
            f"a floor of {floor}, {bins} bins, binning {binning!r}: give a floor in [0, 1), at least 1 bin and one of "
            f"{', '.join(BINNINGS)}."
        )
    scores = np.asarray(detections.scores, dtype=np.float64)
    words = positions_in(split, detections.category_ids)
    counted = (matches.outcome != LEFT_OUT) & (scores >= floor) & (words >= 0)
    base = np.array(split.base_mask)[words]
    chosen = {"novel": counted & ~base, "base": counted & base, "all": counted}
    correct = matches.outcome == TRUE
    return {
        "floor": floor,
        "bins": bins,
        "binning": binning,
        "subsets": {name: _reliability(scores[chosen[name]], correct[chosen[name]], bins, binning) for name in SUBSETS},
    }


def _reliability(scores, correct, bins, binning):
    """The entry of a subset: of scores [R] float64 and correct [R] bool."""
    total = len(scores)
    counted = {"detections": total, "correct": int(correct.sum())}
    if not total:
        return counted | {"ECE": None, "over_confidence": None, "curve": []}
    index = bin_of(scores, bins, binning)
    counts = np.bincount(index, minlength=bins)
    filled = counts > 0
    counts = counts[filled]
    mean = np.bincount(index, weights=scores, minlength=bins)[filled] / counts
    precision = np.bincount(index, weights=correct.astype(np.float64), minlength=bins)[filled] / counts
    curve = zip(counts.tolist(), mean.tolist(), precision.tolist())
    return counted | {
        "ECE": float(100 * (counts * np.abs(precision - mean)).sum() / total),
        "over_confidence": float(100 * (scores.mean() - correct.mean())),
        "curve": [{"count": count, "score": score, "precision": share} for count, score, share in curve],
    }


def bin_of(scores: np.ndarray, bins: int, binning: str) -> np.ndarray:
    """The bin of each score, [R] int64 in [0, bins).

    Args:
        scores: [R] float64 in [0, 1], R > 0.
        bins: number of bins.
        binning: "width": bin i holds the scores in [i / bins, (i + 1) / bins), the last one 1 as well; "mass": the first
            score of each bin is the one of rank R i / bins (rounded down) in ascending order.
    """
    if binning == "width":
        return np.minimum((scores * bins).astype(np.int64), bins - 1)
    ordered = np.sort(scores)
    starts = np.unique(ordered[np.arange(bins) * len(ordered) // bins])
    return np.searchsorted(starts, scores, side="right") - 1
