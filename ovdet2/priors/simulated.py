"""Simulated concept priors: the annotations (oracle), the annotations with given error rates, and random words.

They bound the effect of a prior on a detector. The random numbers of an image depend only on the seed and its id.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ovdet2.errors import DataError, UsageError
from ovdet2.priors.concept_prior import columns_of
from ovdet2.priors.truth import Truth


class Oracle:
    """Every annotated class with score 1.

    All scores are tied, and the file breaks ties by word index, base classes first: a limit L below the number of
    present classes drops novel classes before base classes.
    """

    kind = "ground truth"

    def __init__(self, truth: dict[int, Truth], names: Sequence[str], words: Sequence[str]) -> None:
        """
        Args:
            truth: dict of image id to :class:`~ovdet2.priors.truth.Truth`.
            names: K class names, by contiguous id.
            words: W words of the prior; classes that are not among them are ignored.

        Raises:
            DataError: no class is among the words.
        """
        self.truth = truth
        self.columns = columns_of(names, words)  # [K] index into the words, -1 for a class that is no word
        if not (self.columns >= 0).any():
            raise DataError(
                f"none of the data set's {len(names)} classes is among the {len(words)} words of the prior."
            )

    @property
    def source(self) -> dict[str, Any]:
        return {"backend": "oracle"}

    def lists(
        self, records: Sequence[Mapping[str, Any]], skip: Callable[[str], object]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for record in records:
            index = self._present(record["image_id"])
            yield record["image_id"], index, torch.ones(len(index))

    def _present(self, image_id):
        columns = self.columns[sorted(self.truth[image_id].present)]
        return columns[columns >= 0]


class NoisyOracle(Oracle):
    """A simulated predictor with given precision and recall; results with it are not results of a method.

    Each present class is listed with probability R. Each other class is listed with probability
    q = R g (1 - P) / (P (K - g)), where g is the number of present classes. Then E[true] = R g and
    E[false] = E[true](1 - P) / P in every image, so over a data set recall tends to R and precision, counted over all
    listed words, to P. An image without a present class gets no word. Scores of true and false words are uniform in
    (0, 1]: a limit of L words is a random choice, and a threshold lowers recall, not precision. In a federated data
    set every class without an annotation may be a false word, even if the image was not annotated for it.
    """

    kind = "simulation"

    def __init__(
        self,
        truth: dict[int, Truth],
        names: Sequence[str],
        words: Sequence[str],
        precision: float,
        recall: float,
        seed: int,
    ) -> None:
        """
        Args:
            truth, names, words: of :class:`Oracle`.
            precision: P, in (0, 1].
            recall: R, in (0, 1].
            seed: non-negative int.

        Raises:
            UsageError: P or R out of range, or P so low that an image has too few absent classes to reach it.
        """
        super().__init__(truth, names, words)
        if not (0 < precision <= 1 and 0 < recall <= 1):
            raise UsageError(f"--precision {precision} and --recall {recall}: both must be above 0 and at most 1.")
        self.precision, self.recall, self.seed = precision, recall, seed
        self.candidates = self.columns[self.columns >= 0]
        most = max((len(self._present(image_id)) for image_id in truth), default=0)
        if self._false_rate(most) > 1:
            raise UsageError(
                f"--precision {precision} is too low for --recall {recall}: an image with {most} of "
                f"{len(self.candidates)} classes has too few absent classes for as many false words; raise --precision "
                "or lower --recall."
            )

    @property
    def source(self) -> dict[str, Any]:
        return {
            "backend": "noisy-oracle",
            "precision": self.precision,
            "recall": self.recall,
            "seed": self.seed,
        }

    def lists(
        self, records: Sequence[Mapping[str, Any]], skip: Callable[[str], object]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for record in records:
            present = torch.isin(self.candidates, self._present(record["image_id"]))
            draw, score = draws(self.seed, record["image_id"], len(present))
            rate = torch.where(present, self.recall, self._false_rate(int(present.sum())))
            listed = draw < rate
            yield record["image_id"], self.candidates[listed], 1 - score[listed].float()

    def _false_rate(self, present):
        others = len(self.candidates) - present
        expected = self.recall * present * (1 - self.precision) / self.precision
        return expected / others if others else float("inf") if expected else 0.0


class Chance:
    """Uniform random scores: the top L of an image are L random words, CCKT's lower bound."""

    kind = "control"

    def __init__(self, words: Sequence[str], seed: int) -> None:
        self.words = words
        self.seed = seed

    @property
    def source(self) -> dict[str, Any]:
        return {"backend": "random", "seed": self.seed}

    def lists(
        self, records: Sequence[Mapping[str, Any]], skip: Callable[[str], object]
    ) -> Iterator[tuple[int, None, torch.Tensor]]:
        for record in records:
            yield record["image_id"], None, draws(self.seed, record["image_id"], len(self.words))[1].float()


def draws(seed: int, image_id: int, count: int) -> torch.Tensor:
    """Tensor [2, count] float64, uniform in [0, 1), from a generator seeded by ``seed`` and ``image_id``."""
    generator = np.random.default_rng([seed, image_id & (2**64 - 1)])
    return torch.from_numpy(generator.random((2, count)))
