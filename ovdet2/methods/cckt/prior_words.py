"""Present words of images from a concept prior file, and their order.

The result does not depend on the order of the vocabulary or of the loader: words of equal score, and words that fill up
a list, are ordered by a hash of the seed, the image and the word.

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
    """Pseudo-random sort keys of words in an image, independent of the order of the vocabulary."""

    def __init__(self, names, seed=0):
        """
        Args:
            names: the K words.
            seed: any integer.
        """
        digests = (hashlib.blake2b(clean_name(name).encode(), digest_size=8).digest() for name in names)
        self.hashes = np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)
        self.seed = seed

    def keys(self, image_id: int) -> np.ndarray:
        """The keys of the K words in an image: array [K] uint64."""
        start = np.array([self.seed, image_id], dtype=np.int64).astype(np.uint64)
        return _mixed(self.hashes ^ _mixed(start[:1] ^ _mixed(start[1:])))


def _mixed(values):
    """Hash of uint64 values: a bijection (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # overflow intended
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ordered_words(index: Tensor, score: Tensor, keys: np.ndarray, top: int | None = None, fill: str = "none") -> Tensor:
    """The present words of an image, best first.

    Args:
        index: Tensor [n] int64, distinct words by descending score.
        score: Tensor [n].
        keys: array [K] uint64, of :class:`WordOrder`; words of equal score are sorted by ascending key.
        top: L, maximum number of words; None: no limit.
        fill: "random" appends other words, in the order of their keys, if there are fewer than L; "none" does not.

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
    """The present words of an image according to a prior file."""

    def __init__(self, priors, names, threshold=0.7, top=6, fill="none", seed=0):
        """
        Args:
            priors: :class:`~ovdet2.priors.concept_prior.ConceptPriors`.
            names: the K words of the vocabulary.
            threshold, top: rho and L of :meth:`ConceptPriors.select`.
            fill: see :func:`ordered_words`.
            seed: see :class:`WordOrder`.

        Raises:
            CacheError: the file has none of the words.
            UsageError: ``fill`` is unknown, or it is "random" without ``top``.
        """
        if fill not in FILLS or (fill == "random" and top is None):
            raise UsageError(
                f"fill is {fill!r} and top {top}: fill must be {' or '.join(FILLS)}, and the latter requires a number top."
            )
        if not priors.coverage(names).shared:
            raise CacheError(
                f"the concept prior {priors.path} has the words {few(priors.words)}; none is in the vocabulary "
                f"({few(names)}): build one with these words (ovdet2 prior --words)."
            )
        self.priors, self.names = priors, tuple(names)
        self.threshold, self.top, self.fill = threshold, top, fill
        self.order = WordOrder(names, seed)

    def __call__(self, image_id):
        """
        Args:
            image_id: image id of the data set.

        Returns:
            Tensor [at most K] int64, indices into ``names``, best first.

        Raises:
            CacheError: the image is not in the prior's data set.
        """
        index, score = self.priors.ranked(image_id, self.names)
        kept = score >= torch.tensor(self.threshold, dtype=torch.float32)
        return ordered_words(index[kept], score[kept], self.order.keys(image_id), self.top, self.fill)


def few(words: Sequence[str]) -> str:
    """The first words of a list, for a message."""
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")
