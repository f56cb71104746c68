"""Absent words: how often a detector finds words that no image contains.

Every detection of such a word is a false positive. The words are the distractors of the evaluation
(TEST.DISTRACTORS), which the user states to be absent, and the words of the data set without any annotation. The latter
count only if the data set is annotated exhaustively, hence not by the federated rules of LVIS.

Shapes: A absent words, R detections of them, N images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import UsageError
from ovdet2.evaluation.columns import Truth
from ovdet2.evaluation.error_analysis import positions_in
from ovdet2.evaluation.predictions import Predictions
from ovdet2.vocabulary.templates import clean_name

THRESHOLD = 0.3  # that of ovdet2 predict
QUANTILES = (0.5, 0.9, 0.99, 1.0)
_LISTED = 20  # words in the result


@dataclass(frozen=True)
class AbsentDetections:
    """The detections of absent words, among the best of each image over all words.

    Attributes:
        words: A names.
        word: [R] int64, the word of each detection.
        image_ids: [R] int64.
        scores: [R] float64.
    """

    words: tuple[str, ...]
    word: np.ndarray
    image_ids: np.ndarray
    scores: np.ndarray

    def only(self, names: Sequence[str]) -> "AbsentDetections":
        """Those of some of the words, in the order given.

        Raises:
            UsageError: a name is no absent word.
        """
        row_of = {clean_name(word): row for row, word in enumerate(self.words)}
        unknown = [name for name in names if clean_name(name) not in row_of]
        if unknown:
            raise UsageError(
                f"{unknown[0]!r} is no absent word of this evaluation, which has {', '.join(self.words[:5]) or 'none'}: "
                "evaluate with it in TEST.DISTRACTORS."
            )
        rows = np.array([row_of[clean_name(name)] for name in names], dtype=np.int64)
        new = np.full(len(self.words), -1)
        new[rows] = np.arange(len(rows))
        kept = new[self.word] >= 0
        return AbsentDetections(tuple(names), new[self.word][kept], self.image_ids[kept], self.scores[kept])


def absent_detections(
    truth: Truth, predictions: Predictions, split: Split, distractors: Sequence[str]
) -> AbsentDetections | None:
    """The absent words of an evaluation and their detections; None if there is no such word.

    Args:
        truth, predictions: of one evaluation. Predictions of earlier versions, without the scores of distractors, have
            the words of the data set only.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        distractors: further words of the evaluation.
    """
    federated = any("neg_category_ids" in record for record in truth.images.values())
    annotated = np.bincount(positions_in(split, truth.category_ids), minlength=len(split.names)) > 0
    places = np.zeros(0, dtype=np.int64) if federated else np.flatnonzero(~annotated)
    stated = predictions.distractors
    words = [split.names[place] for place in places.tolist()]
    new = np.full(len(split.names) + 1, -1)  # the last entry is of detections outside of the split
    new[places] = np.arange(len(places))
    found = predictions.detections
    word = new[positions_in(split, found.category_ids)]
    columns = [(word[word >= 0], found.image_ids[word >= 0], found.scores[word >= 0])]
    if stated is not None:
        columns.append((stated.words + len(words), stated.image_ids, stated.scores))
        words += distractors
    if not words:
        return None
    of_word, image_ids, scores = (np.concatenate(part) for part in zip(*columns))
    return AbsentDetections(tuple(words), of_word.astype(np.int64), image_ids, scores.astype(np.float64))


def absent_words(found: AbsentDetections, images: int, threshold: float = THRESHOLD) -> dict[str, Any]:
    """False positives per image at a threshold, and the distribution of scores.

    Args:
        found: detections of absent words.
        images: N, with and without such detections.
        threshold: detections with a higher score count.

    Returns:
        dict for ``json.dumps``: "words": A, "threshold", "images": N, "false_positives_per_image" (all words together),
        "false_positives_per_image_and_word" (the same / A), "images_with_false_positives" (percent), "score_quantiles"
        {quantile: score} over the detections (None without any), "highest_score_quantiles" {quantile: score} over the
        images, of each image's highest score of an absent word (0 without a detection), and "per_word", the up to 20
        words with the most false positives: [{"word", "false_positives_per_image", "highest_score"}, ...].
    """
    above = found.scores > threshold
    highest = np.zeros(images)
    image_ids, first = _highest(found.image_ids, found.scores)
    highest[: len(image_ids)] = found.scores[first]  # the order of the images does not matter
    counts = np.bincount(found.word[above], minlength=len(found.words))
    best = np.zeros(len(found.words))
    np.maximum.at(best, found.word, found.scores)
    order = np.lexsort((-best, -counts))[:_LISTED].tolist()
    return {
        "words": len(found.words),
        "threshold": threshold,
        "images": images,
        "false_positives_per_image": float(above.sum() / images),
        "false_positives_per_image_and_word": float(above.sum() / images / len(found.words)),
        "images_with_false_positives": float(100 * (highest > threshold).sum() / images),
        "score_quantiles": _quantiles(found.scores),
        "highest_score_quantiles": _quantiles(highest),
        "per_word": [
            {
                "word": found.words[row],
                "false_positives_per_image": float(counts[row] / images),
                "highest_score": float(best[row]),
            }
            for row in order
        ],
    }


def _highest(groups, scores):
    """(each group once, row of its highest score)."""
    order = np.lexsort((-scores, groups))
    names, first = np.unique(groups[order], return_index=True)
    return names, order[first]


def _quantiles(values):
    """{quantile: value}, the smallest value that at least this share of the values does not exceed."""
    if not len(values):
        return {str(share): None for share in QUANTILES}
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    return dict(zip(map(str, QUANTILES), found.tolist()))
