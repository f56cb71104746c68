"""Caption embeddings and tags in a training sample.

Shapes: n captions, D embedding dimension. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import Tensor

from ovdet2.caches.caption_cache import CaptionCache
from ovdet2.data.datasets.register import split_of
from ovdet2.data.readers.reader import CaptionReader
from ovdet2.data.samples import BOXES, CAPTIONS, IMAGE_LABELS, Sample
from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps.step import Step
from ovdet2.errors import CacheError, UsageError
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary.tags import TagMatcher
from ovdet2.vocabulary.templates import clean_name


@dataclass(frozen=True)
class SubImage:
    """A rectangle of an image that has texts. An ordinary image is one sub-image, a mosaic has one for each cell.

    Attributes:
        box_xyxy: left, top, right, bottom in pixels of the augmented image.
        image_id: of :func:`identity_of`; texts of equal ids are never negatives of each other.
        captions: Tensor [n, D] float32, unit rows: embeddings of captions used in this step; n may be 0.
        tags: indices of concepts, ascending.
    """

    box_xyxy: tuple[float, float, float, float]
    image_id: int
    captions: Tensor
    tags: tuple[int, ...] = ()


@dataclass(frozen=True)
class ImageTexts:
    """The sub-images of a sample. Each method has a subclass, so that several can be attached.

    Attributes:
        cells: at least one :class:`SubImage`.
    """

    cells: tuple[SubImage, ...]


def identity_of(source: str, image_id: int) -> int:
    """A number that identifies an image among those of all sources: ids of two data sets may be equal.

    The first 8 bytes of a hash, a signed 64-bit integer; the same in every run.
    """
    digest = hashlib.sha256(f"{source}\0{image_id}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


class AttachTexts(Step):
    """Attaches the :class:`ImageTexts` of an image with captions or image labels: one sub-image, all of the image.

    One caption is drawn from numpy's global generator. Image labels are the tags, as they are.

    Attributes:
        cache: of the captions; None: no caption embeddings.
        matcher: finds tags in captions; None: no tags.
        all_captions: whether tags come from all captions of the image, not only from the first.
        kind: class of the attached value.
    """

    def __init__(
        self,
        cache: CaptionCache | None,
        matcher: TagMatcher | None,
        all_captions: bool = True,
        kind: type[ImageTexts] = ImageTexts,
    ) -> None:
        self.cache, self.matcher, self.all_captions, self.kind = cache, matcher, all_captions, kind

    def __call__(self, sample: Sample) -> None:
        """
        Raises:
            CacheError: the cache does not hold the captions of the image.
        """
        assert sample.image is not None, "augment the image first"
        height, width = sample.image.shape[1:]
        tags, rows = sample.labels, torch.zeros(0, self.cache.shape[1] if self.cache else 0)
        if sample.captions:
            if self.matcher is not None:
                tags = self.matcher.find(sample.captions if self.all_captions else sample.captions[:1])
            if self.cache is not None:
                count = len(sample.captions)
                rows = self.cache.embedding(sample.image_id, np.random.randint(count), count)[None]
        box = (0.0, 0.0, float(width), float(height))
        identity = identity_of(sample.source, sample.image_id)
        sample.attach(self.kind((SubImage(box, identity, rows, tuple(tags)),)))

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Raise CacheError unless the captions are embedded by this teacher."""
        if self.cache is not None:
            self.cache.require_teacher(teacher, owner)


def text_steps(
    cfg: CfgNode, keys: CfgNode, group: str, source: SourceSpec, names: Sequence[Sequence[str]], kind: type[ImageTexts]
) -> list[Step]:
    """The step of a method with the keys of :func:`~ovdet2.config.text_keys.add_text_keys`; none for images with boxes.

    Args:
        cfg: configuration.
        keys: the method's group of keys.
        group: its name, such as "MODEL.DETIC", for messages.
        source: of the images.
        names: for each concept its names, at least one; empty: no tags.
        kind: class of the attached value.

    Raises:
        UsageError, CacheError: see :func:`open_captions` and :class:`~ovdet2.vocabulary.tags.TagMatcher`; or the labels of
            a data set are of other classes than the concepts.
    """
    if source.kind == BOXES:
        return []
    cache = open_captions(cfg, source) if keys.CAPTION_WEIGHT > 0 else None
    matcher = TagMatcher(names, keys.TAG_RULE) if names else None
    if source.kind == IMAGE_LABELS and matcher is not None:
        for dataset in source.datasets:
            _require_classes(dataset, [of_concept[0] for of_concept in names], group)
    return [AttachTexts(cache, matcher, keys.TAG_CAPTIONS == "all", kind)]


def _require_classes(dataset: str, concepts: Sequence[str], group: str) -> None:
    """Labels are indices of classes: they are tags only if the concepts are these classes in this order."""
    split = split_of(dataset)
    classes = [] if split is None else [clean_name(name) for name in split.names]
    if classes != [clean_name(name) for name in concepts]:
        raise UsageError(
            f"the labels of {dataset} are of {len(classes)} classes, the concepts of {group} are {len(concepts)} others: "
            "give a data set with the classes of DATASETS.TEST in their order, or remove it from DATASETS.SOURCES."
        )


def open_captions(cfg: CfgNode, source: SourceSpec) -> CaptionCache | None:
    """The cache of DATASETS.CAPTION_CACHE for a source, checked against its captions and MODEL.TEACHER; None for image
    labels.

    Raises:
        UsageError: the key is empty, or the source has several data sets, whose image ids may collide.
        CacheError: see :class:`CaptionCache`; or no file is of the data set, or it is of other captions or another teacher.
    """
    if source.kind != CAPTIONS:
        return None
    if len(source.datasets) != 1:
        raise UsageError(
            f"a caption cache is of one data set, and the source {source.name} has {list(source.datasets)}: give each data "
            "set an entry in DATASETS.SOURCES."
        )
    (dataset,) = source.datasets
    paths = [path.strip() for path in cfg.DATASETS.CAPTION_CACHE.split(",") if path.strip()]
    if not paths:
        raise UsageError(
            f"DATASETS.CAPTION_CACHE is empty, but a loss reads caption embeddings: give the file of "
            f"{_build_command(dataset, cfg)}."
        )
    caches = [CaptionCache(path) for path in paths]
    named = [cache for cache in caches if cache.manifest["dataset"] == dataset]
    if len(named) != 1:
        raise CacheError(
            f"DATASETS.CAPTION_CACHE has files of {[cache.manifest['dataset'] for cache in caches]}, and the source "
            f"{source.name} needs one of {dataset}: build it by {_build_command(dataset, cfg)}."
        )
    teacher = Fingerprint.stated(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED)
    named[0].require_teacher(teacher, "MODEL.TEACHER of the configuration")
    reader = DatasetCatalog.get(dataset)
    assert isinstance(reader, CaptionReader)  # its kind is captions
    named[0].require_source(dataset, reader.identity())
    return named[0]


def _build_command(dataset: str, cfg: CfgNode) -> str:
    teacher = cfg.MODEL.TEACHER
    return (
        f"ovdet2 cache captions --dataset {dataset} --architecture {teacher.ARCHITECTURE} --pretrained "
        f"{teacher.PRETRAINED} --output FILE"
    )
