"""The words that are present in an image by a prior file, and their order.

Nothing here depends on the order of the vocabulary or of the loader: words of one score, and those that fill up a list,
are ordered by a key of the seed, the image and the word itself.

Shapes: K words of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ovdet2.errors import CacheError, UsageError
from ovdet2.vocabulary.templates import clean_name

FILLS = ("none", "random")
_SHOWN = 5  # words named in a message


class WordOrder:
    """Keys of words in an image, as good as random, and the same wherever the word stands in the vocabulary."""

    def __init__(self, names, seed=0):
        """
        Args:
            names: K words.
            seed: any integer.
        """
        digests = (hashlib.blake2b(clean_name(name).encode(), digest_size=8).digest() for name in names)
        self.hashes = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
        self.seed = seed

    def keys(self, image_id: int) -> np.ndarray:
        """Array [K] uint64."""
        start = np.array([self.seed, image_id], dtype=np.int64).astype(np.uint64)
        return _mixed(self.hashes ^ _mixed(start[:1] ^ _mixed(start[1:])))


def _mixed(values):
    """A bijection of uint64 that scatters near values (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # wraps around
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ordered_words(index: Tensor, score: Tensor, keys: np.ndarray, top: int | None = None, fill: str = "none") -> Tensor:
    """The words of an image, best first.

    Args:
        index: Tensor [n] int64 of different words, by descending score.
        score: Tensor [n].
        keys: array [K] uint64, of :class:`WordOrder`; of words of one score the least key comes first.
        top: L, the most words; None: no limit.
        fill: "random" adds, to fewer than L, the words of least key among the others, after them.

    Returns:
        Tensor [at most L] int64.
    """
    index, score = index[:top], score[:top]
    order = np.lexsort((keys[index.numpy()], -score.numpy()))
    words = index.numpy()[order]
    if fill == "random" and top is not None and len(words) < top:
        others = np.setdiff1d(np.arange(len(keys)), words)
        words = np.concatenate([words, others[np.argsort(keys[others], kind="stable")][: top - len(words)]])
    return torch.from_numpy(words.astype(np.int64))


class PriorWords:
    """The words of an image by a prior file."""

    def __init__(self, priors, names, threshold=0.7, top=6, fill="none", seed=0):
        """
        Args:
            priors: :class:`~ovdet2.priors.concept_prior.ConceptPriors`.
            names: K words of the vocabulary.
            threshold, top: rho and L of :meth:`ConceptPriors.select`.
            fill: see :func:`ordered_words`.
            seed: see :class:`WordOrder`.

        Raises:
            CacheError: the file knows none of the words.
            UsageError: another ``fill``, or no limit to fill up to.
        """
        if fill not in FILLS or (fill == "random" and top is None):
            raise UsageError(
                f"words are filled up by {' or '.join(FILLS)}, the latter to a number; not by {fill!r} to {top}."
            )
        if not priors.coverage(names).shared:
            raise CacheError(
                f"the concept prior {priors.path} is about {few(priors.words)}, none of which is in the vocabulary "
                f"({few(names)}): build one with these words (ovdet2 prior --words)."
            )
        self.priors, self.names = priors, tuple(names)
        self.threshold, self.top, self.fill = threshold, top, fill
        self.order = WordOrder(names, seed)

    def __call__(self, image_id):
        """
        Args:
            image_id: of the data set.

        Returns:
            Tensor [K] int64 of indices into the names, best first.

        Raises:
            CacheError: the image is not of the prior's data set.
        """
        index, score = self.priors.ranked(image_id, self.names)
        kept = score >= torch.tensor(self.threshold, dtype=torch.float32)
        return ordered_words(index[kept], score[kept], self.order.keys(image_id), self.top, self.fill)


def few(words: Sequence[str]) -> str:
    """The first of some words, for a message."""
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")
