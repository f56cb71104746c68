"""Augmentation: Detectron2's of INPUT.*, DETR's crop, and large scale jitter.

Shapes: H x W augmented image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.dataset_mapper import DatasetMapper

from ovdet2.data.detr_augmentation import detr_crop
from ovdet2.data.large_scale_jitter import large_scale_jitter
from ovdet2.data.samples import BOXES, Sample
from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps.step import Step
from ovdet2.errors import UsageError

logger = logging.getLogger(__name__)


class AugmentImage(Step):
    """Sets ``image`` [3, H, W] uint8 and ``transforms``; draws from numpy's global generator."""

    def __init__(self, augmentations: Sequence[T.Augmentation]) -> None:
        """
        Args:
            augmentations: of Detectron2, in their order.
        """
        self.augmentations = T.AugmentationList(augmentations)

    def __call__(self, sample: Sample) -> None:
        assert sample.pixels is not None, "decode the image first"
        augmented = T.AugInput(sample.pixels)
        transforms = self.augmentations(augmented)
        assert isinstance(transforms, T.TransformList)  # what a list of augmentations returns
        sample.transforms = transforms
        sample.image = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))


def build_augmentations(cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of a source.

    Images with boxes go through all augmentations of INPUT.*. Images with captions or labels are only resized and
    flipped: a crop could remove the objects that the caption or the labels name.

    Args:
        cfg: configuration.
        source: its ``min_sizes`` and ``max_size`` replace INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN.
        is_train: if False, INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST apply, without crop and flip.

    Raises:
        UsageError: INPUT.LSJ together with another crop or with sizes of the source; or invalid sizes.
    """
    cfg = _of_source(cfg, source)
    arguments: dict[str, Any] = DatasetMapper.from_config(cfg, is_train)
    augmentations: list[T.Augmentation] = arguments["augmentations"]
    if is_train and cfg.INPUT.DETR_CROP.ENABLED:
        augmentations.insert(0, detr_crop(cfg.INPUT.DETR_CROP.RESIZE, cfg.INPUT.DETR_CROP.SIDES))
    if is_train and cfg.INPUT.LSJ.ENABLED:
        if cfg.INPUT.DETR_CROP.ENABLED or cfg.INPUT.CROP.ENABLED:
            raise UsageError("INPUT.LSJ crops by itself: switch INPUT.DETR_CROP and INPUT.CROP off.")
        if source.min_sizes or source.max_size:
            raise UsageError(
                f"INPUT.LSJ sets the sizes of all images with boxes: remove min_size and max_size of {source.name} "
                "from DATASETS.SOURCES, or switch INPUT.LSJ off."
            )
        augmentations[:1] = large_scale_jitter(cfg.INPUT.LSJ.SCALES, cfg.INPUT.LSJ.SIDE)
    logger.debug("Augmentations of %s in %s: %s", source.name, "training" if is_train else "inference", augmentations)
    return augmentations


def _of_source(cfg, source):
    """A copy of the configuration with the sizes of the source, and without crops if the source has no boxes."""
    cfg = cfg.clone()
    cfg.defrost()
    if source.min_sizes:
        cfg.INPUT.MIN_SIZE_TRAIN = tuple(source.min_sizes)
    if source.max_size:
        cfg.INPUT.MAX_SIZE_TRAIN = source.max_size
    if source.kind != BOXES:
        cfg.INPUT.CROP.ENABLED = cfg.INPUT.DETR_CROP.ENABLED = cfg.INPUT.LSJ.ENABLED = False
    return cfg
