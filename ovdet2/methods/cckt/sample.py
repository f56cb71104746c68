"""Sample steps of CCKT-Det: attach the present words of an image, and teacher embeddings of its object crops.

Shapes: P present words, M objects, D embedding dimension. Names: ``gt_`` ground truth.
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
    """The words present in an image, which are the semantic priors of its queries.

    Attributes:
        words: Tensor [P] int64 on the CPU, best first: indices of base words in training, of all words at test. If
            there are more words than queries, the last ones are ignored.
    """

    words: Tensor


@dataclass(frozen=True)
class ObjectCrops:
    """Teacher embeddings of the crops of the M instances.

    Attributes:
        embeddings: Tensor [M, D] float16, unit rows where ``embedded``, zero elsewhere.
        embedded: Tensor [M] bool.
    """

    embeddings: Tensor
    embedded: Tensor


class AttachPresentWords(Step):
    """Attaches :class:`PresentWords`.

    Attributes:
        words: function from a sample to its words, Tensor [P] int64: :class:`AnnotatedWords` or
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
    """Attaches :class:`ObjectCrops` of the annotated boxes that remain after augmentation.

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
        ann_ids = torch.tensor(ids, dtype=torch.int64)[sample.kept]
        sample.attach(ObjectCrops(*self.cache.of_annotations(sample.image_id, ann_ids)))

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Raise CacheError unless the cache is of this teacher."""
        self.cache.require_teacher(teacher, owner)


class AnnotatedWords:
    """For training: the base words of the annotations that remain after augmentation.

    Their order is drawn from numpy's global generator, so that no class always has the same block of queries.
    """

    def __init__(self, num_base: int, dropout: float = 0.0, distractors: int = 0) -> None:
        """
        Args:
            num_base: number of base words; distractors are drawn from them.
            dropout: probability that a word is dropped.
            distractors: maximum number of added words without annotation; the number is drawn from 0 to this maximum.

        Raises:
            UsageError: a number is out of range.
        """
        if not 0 <= dropout < 1 or distractors < 0:
            raise UsageError(
                f"MODEL.CCKT.PRIOR_DROPOUT is {dropout} and PRIOR_DISTRACTORS {distractors}: choose a fraction in [0, 1) "
                "and a number >= 0."
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
    """For test: the present words of a prior file."""

    def __init__(self, words: PriorWords) -> None:
        self.words = words

    def __call__(self, sample: Sample) -> Tensor:
        """Tensor [P] int64, best first; raises CacheError for an image that the file does not have."""
        return self.words(sample.image_id)


def build_steps(cfg: CfgNode, datasets: Sequence[str], is_train: bool) -> list[Step]:
    """Build the steps for images with boxes from MODEL.CCKT.

    Training also opens the priors of the test, so that an unsuitable file is reported before the training.

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
    """Open the cache MODEL.CCKT.REGION_CACHE for some data sets; it must hold annotated boxes.

    Raises:
        UsageError, CacheError: see :func:`~ovdet2.caches.training_cache.open_training_cache`; or it holds other boxes
            than the annotated ones.
    """
    key = "MODEL.CCKT.REGION_CACHE"
    cache = open_training_cache(
        cfg.MODEL.CCKT.REGION_CACHE, datasets, cfg, key, "MODEL.CCKT.CONTRAST", "--boxes annotations --config-file FILE"
    )
    if cache.manifest["recipe"]["boxes"]["source"] != "annotations":
        raise CacheError(
            f"the region cache {cache.folder} holds {cache.manifest['recipe']['boxes']['source']}, MODEL.CCKT.CONTRAST "
            "needs annotated boxes: build one with ovdet2 cache build --boxes annotations."
        )
    return cache


def open_prior_words(cfg: CfgNode) -> PriorWords:
    """:class:`PriorWords` of MODEL.CCKT.PRIOR_FILE, checked against DATASETS.TEST; logs their source.

    Raises:
        UsageError: no file is named, there are several test sets (one file has one set of image ids), or an unknown
            MODEL.CCKT.PRIOR_FILL.
        CacheError: see :class:`ConceptPriors` and :class:`PriorWords`; or the file is of another data set.
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
    logger.info(
        "Semantic priors at test: words with score >= %g, at most %d per image: %s.", words.threshold, words.top, priors
    )
    unknown = priors.coverage(names).unknown
    if unknown:
        logger.warning(
            "The concept prior lacks %d of the %d words of the vocabulary: %s.", len(unknown), len(names), few(unknown)
        )
    if priors.kind != "prediction":
        logger.warning(
            "The priors are not predicted but %s: do not report figures with them as results of a method.", priors.kind
        )
    return words


def prior_facts(cfg: CfgNode) -> dict[str, Any]:
    """Entries about the priors for report.json; {} without a prior file."""
    settings = cfg.MODEL.CCKT
    if not (settings.ENABLED and settings.PRIORS and settings.PRIOR_FILE):  # without a file the loader raises
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
