"""What CCKT-Det adds to a sample: the words present in the image, and the teacher's crops of its objects.

Shapes: P present words, M objects, D embedding dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from ovdet2.caches.region_cache import RegionCache
from ovdet2.caches.training_cache import known_regions, open_training_cache
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.splits import distractors
from ovdet2.data.samples import Sample
from ovdet2.data.steps.step import Step
from ovdet2.errors import CacheError, UsageError
from ovdet2.methods.cckt.prior_words import FILLS, PriorWords, few
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.vlm.fingerprint import Fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PresentWords:
    """Words that are present in an image, the semantic priors of its queries.

    Attributes:
        words: Tensor [P] int64 on the CPU: indices of base words in training, of the whole vocabulary at test; the
            first count most where there are more than queries.
    """

    words: Tensor


@dataclass(frozen=True)
class ObjectCrops:
    """The teacher's embeddings of the crops of the M instances.

    Attributes:
        embeddings: Tensor [M, D] float16, unit rows where ``embedded``, zero elsewhere.
        embedded: Tensor [M] bool.
    """

    embeddings: Tensor
    embedded: Tensor


class AttachPresentWords(Step):
    """Attaches :class:`PresentWords`.

    Attributes:
        words: function of a sample that gives the words, Tensor [P] int64: :class:`AnnotatedWords` or
            :class:`WordsOfFile`.
    """

    def __init__(self, words: Callable[[Sample], Tensor]) -> None:
        self.words = words

    def __call__(self, sample: Sample) -> None:
        """
        Raises:
            CacheError: the prior file has no entry for the image.
        """
        sample.attach(PresentWords(self.words(sample)))


class AttachObjectCrops(Step):
    """Attaches :class:`ObjectCrops` of the annotated boxes that augmentation has left.

    Attributes:
        cache: :class:`RegionCache` of the annotated boxes of the training set.
    """

    def __init__(self, cache: RegionCache) -> None:
        self.cache = cache

    def __call__(self, sample: Sample) -> None:
        """
        Raises:
            CacheError: see :func:`~ovdet2.caches.training_cache.known_regions`.
        """
        if sample.annotations is None:
            return
        ids = [annotation.get("id", -1) for annotation in sample.annotations]
        known_regions(self.cache, sample.image_id, sample.width, sample.height, ids)
        kept = torch.tensor(ids, dtype=torch.int64)[sample.kept]
        sample.attach(ObjectCrops(*self.cache.of_annotations(sample.image_id, kept)))

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Raise CacheError unless the cache is of this teacher."""
        self.cache.require_teacher(teacher, owner)


class AnnotatedWords:
    """The words annotated in what augmentation has left of an image, for training: base words only.

    Their order is drawn from numpy's global generator, so that no block of queries belongs to a class.
    """

    def __init__(self, num_base: int, dropout: float = 0.0, distractors: int = 0) -> None:
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

    def __call__(self, sample: Sample) -> Tensor:
        """
        Args:
            sample: with ``instances``, whose ``gt_classes`` are below the number of base words.

        Returns:
            Tensor [P] int64.
        """
        assert sample.instances is not None  # only images with boxes have annotated words
        present = np.unique(sample.instances.gt_classes.numpy())
        words = present[np.random.random(len(present)) >= self.dropout] if self.dropout else present
        if self.distractors:
            others = np.setdiff1d(np.arange(self.num_base), present)
            count = min(np.random.randint(self.distractors + 1), len(others))
            words = np.concatenate([words, np.random.permutation(others)[:count]])
        return torch.from_numpy(np.random.permutation(words).astype(np.int64))


class WordsOfFile:
    """The words of a prior file, for the test."""

    def __init__(self, words: PriorWords) -> None:
        self.words = words

    def __call__(self, sample: Sample) -> Tensor:
        """Tensor [P] int64, best first; raises CacheError for an image that the file does not have."""
        return self.words(sample.image_id)


def build_steps(cfg: CfgNode, datasets: Sequence[str], is_train: bool) -> list[Step]:
    """The steps for images with boxes, as MODEL.CCKT asks for them.

    The priors of the test are opened for training, too: a file that does not fit must be known before the hours.

    Raises:
        UsageError, CacheError: see :func:`open_annotation_cache` and :func:`open_prior_words`.
    """
    settings, steps = cfg.MODEL.CCKT, []
    words = open_prior_words(cfg) if settings.PRIORS else None
    if is_train and settings.CONTRAST != "none":
        steps.append(AttachObjectCrops(open_annotation_cache(cfg, datasets)))
    if words is not None and is_train:
        annotated = AnnotatedWords(
            len(required_split(datasets[0]).base), settings.PRIOR_DROPOUT, settings.PRIOR_DISTRACTORS
        )
        steps.append(AttachPresentWords(annotated))
    elif words is not None:
        steps.append(AttachPresentWords(WordsOfFile(words)))
    return steps


def open_annotation_cache(cfg: CfgNode, datasets: Sequence[str]) -> RegionCache:
    """The cache of MODEL.CCKT.REGION_CACHE for some data sets, which must be of annotated boxes.

    Raises:
        UsageError, CacheError: see :func:`~ovdet2.caches.training_cache.open_training_cache`; or it holds other boxes
            than the annotated ones.
    """
    key = "MODEL.CCKT.REGION_CACHE"
    cache = open_training_cache(cfg.MODEL.CCKT.REGION_CACHE, datasets, cfg, key, "MODEL.CCKT.CONTRAST")
    if cache.manifest["recipe"]["boxes"]["source"] != "annotations":
        raise CacheError(
            f"the region cache {cache.folder} holds {cache.manifest['recipe']['boxes']['source']}, MODEL.CCKT.CONTRAST "
            "needs annotated boxes: build one with ovdet2 cache build --boxes annotations."
        )
    return cache


def open_prior_words(cfg: CfgNode) -> PriorWords:
    """:class:`PriorWords` of MODEL.CCKT.PRIOR_FILE, checked against DATASETS.TEST; logs their source.

    Raises:
        UsageError: no file is named, several test sets, whose image ids one file cannot tell apart, or no such
            MODEL.CCKT.PRIOR_FILL.
        CacheError: see :class:`ConceptPriors` and :class:`PriorWords`; or it is of another data set.
    """
    settings, tests = cfg.MODEL.CCKT, cfg.DATASETS.TEST
    if not settings.PRIOR_FILE:
        raise UsageError(
            "MODEL.CCKT.PRIORS is True but MODEL.CCKT.PRIOR_FILE is empty: name a file that "
            "ovdet2 prior made for DATASETS.TEST."
        )
    if settings.PRIOR_FILL not in FILLS:
        raise UsageError(f"MODEL.CCKT.PRIOR_FILL is {settings.PRIOR_FILL!r}: choose {' or '.join(FILLS)}.")
    if len(tests) != 1:
        raise UsageError(
            f"a concept prior belongs to one data set, DATASETS.TEST names {list(tests)}: evaluate one at a time."
        )
    priors = ConceptPriors(settings.PRIOR_FILE)
    priors.require_dataset(tests[0], MetadataCatalog.get(tests[0]).ov_files()[0])
    names = (*required_split(tests[0]).names, *distractors(cfg))
    words = PriorWords(
        priors, names, settings.PRIOR_THRESHOLD, settings.PRIOR_TOP, settings.PRIOR_FILL, max(cfg.SEED, 0)
    )
    logger.info("Words at test, score from %g, at most %d: %s.", words.threshold, words.top, priors)
    unknown = priors.coverage(names).unknown
    if unknown:
        logger.warning("Of %d of the %d words the prior says nothing: %s.", len(unknown), len(names), few(unknown))
    if priors.kind != "prediction":
        logger.warning(
            "The priors are no prediction but %s: figures with them are no results of a method.", priors.kind
        )
    return words


def prior_facts(cfg: CfgNode) -> dict[str, Any]:
    """What a report states of the priors of its detector; {} without a prior file."""
    settings = cfg.MODEL.CCKT
    if not (settings.ENABLED and settings.PRIORS and settings.PRIOR_FILE):  # without one the loader stops
        return {}
    manifest = ConceptPriors(settings.PRIOR_FILE).manifest
    chosen = {"threshold": settings.PRIOR_THRESHOLD, "top": settings.PRIOR_TOP, "fill": settings.PRIOR_FILL}
    stated = {key: manifest[key] for key in ("kind", "source", "content_sha256")}
    return {"concept_prior": {"file": settings.PRIOR_FILE, **stated, **chosen}}


def required_split(dataset: str) -> Split:
    """The base and novel classes of a data set.

    Raises:
        UsageError: it has no split.
    """
    split = split_of(dataset)
    if split is None:
        raise UsageError(f"the data set {dataset!r} has no base/novel split: register it with register_ov_dataset.")
    return split
