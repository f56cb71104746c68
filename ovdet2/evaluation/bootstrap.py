"""How uncertain AP is because another set of images could have been evaluated: the bootstrap over images.

Images are drawn with replacement, and AP is computed as if each image were in the data set as often as it was drawn. The
detections are matched once: a resample only changes the weights of images in the sums of true and false positives. Two
evaluations on the same images are compared on the same resamples (paired).

An interval has the width of the percentiles of the resamples and is centred on the figure: it is shifted by the
difference between the figure and the mean of the resamples. AP takes the best precision at each recall or a larger one;
repeated images make this maximum larger, so that the mean of the resamples lies above the figure, often by more than the
interval is wide.

Shapes: N images, B resamples, R detections of a class, T = 10 IoU thresholds. Arithmetic is float64.
Names: ``gt_`` ground truth.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation.coco_ap import class_columns, image_overlaps, slice_of
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.federation import Federation
from ovdet2.evaluation.proposal_recall import IOU_THRESHOLDS

RESAMPLES, SEED, LEVEL = 200, 0, 95  # LEVEL in percent
LARGE = 3_000_000  # detections of a data set above which intervals are only made on request
_RECALLS = np.linspace(0, 1, 101)
_CELLS = 4_000_000  # of an array of resamples x detections


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class by descending score, those of equal score by ascending image id, and what they match.

    Attributes:
        scores: [R] float64.
        images: [R] int64, position of the image in the data set, by ascending image id.
        true: [T, R] bool, matched to an object that is not ignored.
        ignored: [T, R] bool, counted neither as true nor as false positive.
        gt_images: [G] int64, position of the image of each object that is not ignored.
    """

    scores: np.ndarray
    images: np.ndarray
    true: np.ndarray
    ignored: np.ndarray
    gt_images: np.ndarray


def match_classes(
    truth: Truth,
    detections: Detections,
    category_ids: Sequence[int],
    task: str = "bbox",
    federation: Federation | None = None,
    crowds: bool = True,
) -> Iterator[tuple[int, ClassMatches]]:
    """Match the detections of each class by the rules of COCO or LVIS, over all areas, at IoU 0.50:0.05:0.95.

    Args:
        truth, detections, category_ids, task, federation, crowds: as of
            :func:`~ovdet2.evaluation.coco_ap.evaluate_classes`.

    Yields:
        (category id, :class:`ClassMatches`) of the classes that have ground truth other than crowds.
    """
    all_images = np.array(sorted(truth.images), dtype=np.int64)
    for category_id, gt, found in class_columns(truth, detections, category_ids, task, federation):
        count = len(found["image_ids"])
        true, ignored = np.zeros((len(IOU_THRESHOLDS), count), bool), np.zeros((len(IOU_THRESHOLDS), count), bool)
        if "lvis_mark" in found:
            ignored |= found["lvis_mark"]
        for image_id in np.intersect1d(gt["image_ids"], found["image_ids"]).tolist():
            rows, crowd = slice_of(found["image_ids"], image_id), gt["iscrowd"][slice_of(gt["image_ids"], image_id)]
            overlaps = image_overlaps(gt, found, image_id, crowds)
            _match_image(overlaps, crowd.astype(bool), true[:, rows], ignored[:, rows])
        order = np.lexsort((found["image_ids"], -found["score"]))
        gt_image_ids = gt["image_ids"][gt["iscrowd"] == 0]
        yield (
            category_id,
            ClassMatches(
                scores=found["score"][order],
                images=np.searchsorted(all_images, found["image_ids"][order]),
                true=true[:, order],
                ignored=ignored[:, order],
                gt_images=np.searchsorted(all_images, gt_image_ids),
            ),
        )


def _match_image(overlaps, crowd, true, ignored):
    """Fill ``true`` and ``ignored`` [T, R] of one image and class; ``overlaps`` is [R, G], by descending score.

    Each detection takes the free object of the largest overlap, of equal ones the last; only if none fits, a crowd,
    which is never used up.
    """
    gt_order = np.argsort(crowd, kind="stable")
    overlaps, plain = overlaps[:, gt_order], int((~crowd).sum())
    free = np.ones((len(IOU_THRESHOLDS), plain), dtype=bool)
    needed = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    for row in np.flatnonzero(overlaps.max(axis=1) >= needed[0]):
        values = overlaps[row]
        found = np.zeros(len(needed), dtype=bool)
        if plain:
            fits = np.where(free, values[:plain], -1.0)  # T x plain
            best = plain - 1 - fits[:, ::-1].argmax(axis=1)
            found = fits[np.arange(len(needed)), best] >= needed
            free[found, best[found]] = False
        true[:, row] = found
        on_crowd = values[plain:].max() >= needed if plain < len(values) else False
        ignored[:, row] = ~found & (ignored[:, row] | on_crowd)


def image_weights(count: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each of N images is drawn in each resample of N images: [B, N] uint16, the same for the same seed."""
    random = np.random.default_rng(seed)
    weights = np.empty((resamples, count), dtype=np.uint16)
    for row in weights:
        row[:] = np.bincount(random.integers(count, size=count), minlength=count)
    return weights


def resampled_ap(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """AP of a class on resampled images, at each IoU threshold.

    Args:
        matches: of the class.
        weights: [B, N], how often each image counts; all ones give AP on the data set.

    Returns:
        [B, T] float64 in percent, by 101 recall points; nan in a resample without an object of the class.
    """
    chunk = max(1, _CELLS // max(1, len(matches.scores)))
    parts = [_resampled(matches, weights[first : first + chunk]) for first in range(0, len(weights), chunk)]
    return np.concatenate(parts) if parts else np.zeros((0, len(IOU_THRESHOLDS)))


def _resampled(matches, weights):
    objects = weights[:, matches.gt_images].sum(axis=1, dtype=np.float64)  # B
    of_detections = weights[:, matches.images].astype(np.float64)  # B x R
    reached = of_detections.cumsum(axis=1)
    values = np.zeros((len(weights), len(IOU_THRESHOLDS)))
    for threshold in range(len(IOU_THRESHOLDS)):
        true, ignored = np.flatnonzero(matches.true[threshold]), matches.ignored[threshold]
        if not len(true):
            continue
        counted = reached[:, true]
        if ignored.any():
            positions = np.flatnonzero(ignored)
            before = np.searchsorted(positions, true)  # ignored detections of higher rank
            sums = of_detections[:, positions].cumsum(axis=1)
            counted = counted - np.pad(sums, ((0, 0), (1, 0)))[:, before]
        values[:, threshold] = _interpolated(of_detections[:, true].cumsum(axis=1), counted, objects)
    values[objects == 0] = math.nan
    return values


def _interpolated(hits, counted, objects):
    """[B] AP in percent of the points after each true positive: ``hits`` and ``counted`` are [B, P] weighted sums."""
    precision = np.divide(hits, counted, out=np.zeros_like(hits), where=counted > 0)
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    recall = np.divide(hits, objects[:, None], out=np.zeros_like(hits), where=objects[:, None] > 0)
    # The recall points up to each recall: a point is answered by the first true positive that reaches it.
    points = np.searchsorted(_RECALLS, recall, side="right")
    answered = np.diff(points, axis=1, prepend=0)
    answered[hits == 0] = 0  # recall 0 is reached, but by no true positive
    first = (hits > 0).argmax(axis=1)
    rows = np.flatnonzero(hits[:, -1] > 0)
    answered[rows, first[rows]] = points[rows, first[rows]]
    return 100.0 * (best * answered).sum(axis=1) / len(_RECALLS)


def bootstrap(
    truth: Truth,
    detections: Detections,
    split: Split,
    names: Sequence[str],
    subsets: Mapping[str, Iterable[int]],
    federation: Federation | None = None,
    crowds: bool = True,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> dict[str, Any]:
    """Figures of boxes on resampled images.

    Args:
        truth, detections, federation, crowds: as of :func:`~ovdet2.evaluation.coco_ap.evaluate_classes`.
        split: its classes.
        names: of "AP" and "AP50".
        subsets: {report row: category ids}; a figure is the mean over those with ground truth in the resample.
        resamples: B.
        seed: of the resamples.

    Returns:
        dict for ``json.dumps``: "resamples", "seed", "level" (percent), "figures" {"AP50-novel": percent, ...} on the
        data set, "intervals" {"AP50-novel": [low, high], ...} and "values" {"AP50-novel": [B percentages], ...}; None
        where a figure does not exist.
    """
    weights = image_weights(len(truth.images), resamples, seed)
    weights = np.concatenate([np.ones_like(weights[:1], shape=(1, len(truth.images))), weights])  # the data set first
    of_classes = {
        category_id: resampled_ap(matches, weights)
        for category_id, matches in match_classes(truth, detections, split.category_ids, "bbox", federation, crowds)
    }
    values = {}
    for name in names:
        of_name = {
            category_id: of_class[:, 0] if name == "AP50" else of_class.mean(axis=1)
            for category_id, of_class in of_classes.items()
        }
        for subset, ids in subsets.items():
            means = _mean_of([of_name[i] for i in ids if i in of_name], resamples + 1).tolist()
            values[f"{name}-{subset}"] = [None if math.isnan(mean) else mean for mean in means]
    intervals = {key: interval(figure, resampled) for key, (figure, *resampled) in values.items()}
    return {
        "resamples": resamples,
        "seed": seed,
        "level": LEVEL,
        "figures": {key: figure for key, (figure, *_) in values.items()},
        "intervals": {key: ends and [max(ends[0], 0.0), min(ends[1], 100.0)] for key, ends in intervals.items()},
        "values": {key: resampled for key, (_, *resampled) in values.items()},
    }


def interval(figure: float | None, resampled: Sequence[float | None], level: float = LEVEL) -> list[float] | None:
    """The interval of a figure: the percentiles of its resamples, shifted so that their mean is the figure.

    Args:
        figure: on the data set; None: it does not exist.
        resampled: on the resamples; None is skipped.
        level: percent of the resamples that lie within.

    Returns:
        [low, high]; None without a figure or without resamples of it.
    """
    known = np.array([value for value in resampled if value is not None], dtype=np.float64)
    if figure is None or not len(known):
        return None
    tail = (100 - level) / 2
    return [float(figure + value) for value in np.percentile(known - known.mean(), [tail, 100 - tail])]


def paired_intervals(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> dict[str, list[float]]:
    """Intervals of the differences b - a of two evaluations on the same images.

    Args:
        a, b: of :func:`bootstrap`; None without one.

    Returns:
        {"AP50-novel": [low, high], ...}; empty unless both have the same number of resamples and the same seed.
    """
    if not a or not b or any(a.get(key) != b.get(key) for key in ("resamples", "seed", "level")):
        return {}
    intervals = {}
    for key in a["values"]:
        pairs = zip(a["values"][key], b["values"].get(key, []))
        difference = _difference(a["figures"].get(key), b["figures"].get(key))
        found = interval(difference, [_difference(*pair) for pair in pairs], a["level"])
        if found is not None:
            intervals[key] = found
    return intervals


def _difference(before, after):
    return None if before is None or after is None else after - before


def _mean_of(columns, resamples):
    """[B] mean over the classes with a value in the resample; nan without one."""
    if not columns:
        return np.full(resamples, math.nan)
    table = np.stack(columns)  # classes x B
    known = (~np.isnan(table)).sum(axis=0)
    return np.divide(np.nansum(table, axis=0), known, out=np.full(resamples, math.nan), where=known > 0)
