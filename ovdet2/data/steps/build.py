"""Build the steps of a source from a configuration."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ovdet2.config.methods import methods_of
from ovdet2.data.samples import BOXES
from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps.augment import AugmentImage, build_augmentations
from ovdet2.data.steps.decode import DecodeImage
from ovdet2.data.steps.finish import Finish
from ovdet2.data.steps.instances import AttachInstances
from ovdet2.data.steps.step import Step
from ovdet2.errors import UsageError


def build_steps(cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
    """The steps of a source: decoding, augmentation, instances (training images with boxes), methods' steps, cleanup.

    Args:
        cfg: configuration.
        source: of the images.
        is_train: whether annotations become instances.

    Raises:
        UsageError: MODEL.LOAD_PROPOSALS is on (its proposal files are pickles, which ovdet2 does not read);
            MODEL.MASK_ON for a training set without masks; or see :func:`build_augmentations`.
        UsageError, CacheError: see :meth:`~ovdet2.config.method.Method.steps`.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UsageError("MODEL.LOAD_PROPOSALS reads pickled files, which ovdet2 does not open: set it to False.")
    with_boxes = is_train and source.kind == BOXES
    if with_boxes and cfg.MODEL.MASK_ON:
        _require_masks(source)
    steps: list[Step] = [DecodeImage(cfg.INPUT.FORMAT), AugmentImage(build_augmentations(cfg, source, is_train))]
    if with_boxes:
        steps.append(AttachInstances.from_config(cfg))
    for method in methods_of(cfg):
        steps += method.steps(cfg, source, is_train)
    return [*steps, Finish()]


def _require_masks(source: SourceSpec) -> None:
    maskless = [name for name in source.datasets if not MetadataCatalog.get(name).get("ov_masks")]
    if maskless:
        raise UsageError(
            f"MODEL.MASK_ON is True, but {', '.join(maskless)} has boxes only: set it to False, or register the data "
            "set with masks=True."
        )
