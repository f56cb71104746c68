"""The words that a detector with semantic priors is told of an image: annotated ones in training, a file's at test.

Nothing here depends on the order of the vocabulary or of the loader: words of one score, and those that fill up a list,
are ordered by a key of the seed, the image and the word itself.

Shapes: K words of the vocabulary.
"""

import hashlib
import logging

import numpy as np
import torch
from detectron2.data import MetadataCatalog

from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.splits import distractors
from ovdet2.errors import CacheError, UsageError
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.vocabulary.templates import clean_name

logger = logging.getLogger(__name__)

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

    def keys(self, image_id):
        """Array [K] uint64."""
        start = np.array([self.seed, image_id], dtype=np.int64).astype(np.uint64)
        return _mixed(self.hashes ^ _mixed(start[:1] ^ _mixed(start[1:])))


def _mixed(values):
    """A bijection of uint64 that scatters near values (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # wraps around
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ordered_words(index, score, keys, top=None, fill="none"):
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
    """The words of an image by a prior file, for the test."""

    def __init__(self, priors, names, threshold=0.7, top=6, fill="none", seed=0):
        """
        Args:
            priors: :class:`ConceptPriors`.
            names: K words of the vocabulary.
            threshold, top: rho and L of :meth:`ConceptPriors.select`.
            fill: see :func:`ordered_words`.
            seed: see :class:`WordOrder`.

        Raises:
            CacheError: the file knows none of the words.
            UsageError: another ``fill``, or no limit to fill up to.
        """
        if fill not in FILLS or (fill == "random" and top is None):
            raise UsageError(f"MODEL.CCKT.PRIOR_FILL is {fill!r}: choose {' or '.join(FILLS)}.")
        if not priors.coverage(names).shared:
            raise CacheError(
                f"the concept prior {priors.path} is about {_few(priors.words)}, none of which is in the vocabulary "
                f"({_few(names)}): build one with these words (tools/build_concept_priors.py --words)."
            )
        self.priors, self.names = priors, tuple(names)
        self.threshold, self.top, self.fill = threshold, top, fill
        self.order = WordOrder(names, seed)

    def __call__(self, record):
        """
        Args:
            record: with "image_id".

        Returns:
            Tensor [K] int64 of indices into the names, best first.

        Raises:
            CacheError: the image is not of the prior's data set.
        """
        image_id = record["image_id"]
        index, score = self.priors.ranked(image_id, self.names)
        kept = score >= torch.tensor(self.threshold, dtype=torch.float32)
        return ordered_words(index[kept], score[kept], self.order.keys(image_id), self.top, self.fill)


class AnnotatedWords:
    """The words annotated in what augmentation has left of an image, for training; base words alone.

    Their order is drawn, from numpy's global generator, as all else: of the queries, no block belongs to a class.
    """

    def __init__(self, num_base, dropout=0.0, distractors=0):
        """
        Args:
            num_base: number of base words; distractors are drawn from them.
            dropout: probability of a word to be left out.
            distractors: most words added that are not annotated; their number is drawn from 0 to it.

        Raises:
            UsageError: a number out of range.
        """
        if not 0 <= dropout < 1 or distractors < 0:
            raise UsageError(
                f"MODEL.CCKT.PRIOR_DROPOUT is {dropout} and PRIOR_DISTRACTORS {distractors}: choose a share in [0, 1) "
                "and a number from 0."
            )
        self.num_base, self.dropout, self.distractors = num_base, dropout, distractors

    def __call__(self, record):
        """
        Args:
            record: with "instances", whose ``gt_classes`` are below the number of base words.

        Returns:
            Tensor [K] int64.
        """
        present = np.unique(record["instances"].gt_classes.numpy())
        words = present[np.random.random(len(present)) >= self.dropout] if self.dropout else present
        if self.distractors:
            others = np.setdiff1d(np.arange(self.num_base), present)
            count = min(np.random.randint(self.distractors + 1), len(others))
            words = np.concatenate([words, np.random.permutation(others)[:count]])
        return torch.from_numpy(np.random.permutation(words).astype(np.int64))


def open_prior_words(cfg):
    """:class:`PriorWords` of MODEL.CCKT.PRIOR_FILE, checked against DATASETS.TEST; says whose priors they are.

    Raises:
        UsageError: no file is named, or several test sets, whose image ids one file cannot tell apart.
        CacheError: see :class:`ConceptPriors` and :class:`PriorWords`; or it is of another data set.
    """
    settings, tests = cfg.MODEL.CCKT, cfg.DATASETS.TEST
    if not settings.PRIOR_FILE:
        raise UsageError(
            "MODEL.CCKT.PRIORS is True but MODEL.CCKT.PRIOR_FILE is empty: name a file that "
            "tools/build_concept_priors.py made for DATASETS.TEST."
        )
    if len(tests) != 1:
        raise UsageError(
            f"a concept prior belongs to one data set, DATASETS.TEST names {list(tests)}: evaluate one at a time."
        )
    priors = ConceptPriors(settings.PRIOR_FILE)
    priors.require_dataset(tests[0], MetadataCatalog.get(tests[0]).ov_files()[0])
    names = (*split_of(tests[0]).names, *distractors(cfg))
    words = PriorWords(
        priors, names, settings.PRIOR_THRESHOLD, settings.PRIOR_TOP, settings.PRIOR_FILL, max(cfg.SEED, 0)
    )
    logger.info("Words at test, score from %g, at most %d: %s.", words.threshold, words.top, priors)
    unknown = priors.coverage(names).unknown
    if unknown:
        logger.warning("Of %d of the %d words the prior says nothing: %s.", len(unknown), len(names), _few(unknown))
    if priors.kind != "prediction":
        logger.warning(
            "The priors are no prediction but %s: figures with them are no results of a method.", priors.kind
        )
    return words


def prior_facts(cfg):
    """What a report says of the priors of its detector; {} where there are none."""
    settings = cfg.MODEL.CCKT
    if not (settings.ENABLED and settings.PRIORS and settings.PRIOR_FILE):  # without one the loader says so
        return {}
    manifest = ConceptPriors(settings.PRIOR_FILE).manifest
    chosen = {"threshold": settings.PRIOR_THRESHOLD, "top": settings.PRIOR_TOP, "fill": settings.PRIOR_FILL}
    stated = {key: manifest[key] for key in ("kind", "source", "content_sha256")}
    return {"concept_prior": {"file": settings.PRIOR_FILE, **stated, **chosen}}


def _few(words):
    return ", ".join(words[:_SHOWN]) + (", ..." if len(words) > _SHOWN else "")
