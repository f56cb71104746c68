"""Proposals of a detector trained on base boxes, as the boxes of a region cache.

Shapes: R proposals of an image, in pixels of the original image. Names: ``_logits`` before softmax or sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from ovdet2.caches.region_boxes import BoxFilters, FoundBoxes
from ovdet2.data.datasets import split_of
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.engine.trainer import Trainer
from ovdet2.errors import DataError, UsageError
from ovdet2.vlm.teacher import state_dict_sha256
from ovdet2.vocabulary.templates import clean_name

if TYPE_CHECKING:
    from ovdet2.modeling import OpenVocabularyRCNN


def proposing_config(cfg: CfgNode, filters: BoxFilters) -> CfgNode:
    """The configuration of a detector as it was trained, with as many proposals as the filters may keep.

    Args:
        cfg: not changed.
        filters: :class:`~ovdet2.caches.region_boxes.BoxFilters`; ``nms`` is over all pyramid levels.

    Raises:
        UsageError: MODEL.WEIGHTS is empty.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UsageError("MODEL.WEIGHTS is empty: give the detector trained on base classes, MODEL.WEIGHTS <file>.")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = max(cfg.MODEL.RPN.POST_NMS_TOPK_TEST, filters.top or 0)
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = max(cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST)
    cfg.MODEL.RPN.NMS_THRESH = max(cfg.MODEL.RPN.NMS_THRESH, filters.nms or 0.0)
    cfg.freeze()
    return cfg


class ProposalBoxes:
    """The best proposals of a detector's RPN; scores are objectness probabilities."""

    def __init__(self, cfg: CfgNode, model: OpenVocabularyRCNN) -> None:
        """
        Args:
            cfg: of :func:`proposing_config`.
            model: in evaluation mode.
        """
        self.cfg = cfg
        self.model = model
        self._bgr = cfg.INPUT.FORMAT == "BGR"
        self._resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    @classmethod
    def load(cls, cfg: CfgNode, dataset: str) -> ProposalBoxes:
        """The trained detector of a configuration; the words it was trained with may be of any teacher.

        Raises:
            DataError: its weights cannot be read, or it was trained with boxes of a class that is novel in ``dataset``:
                its proposals would depend on novel classes.
        """
        built = Trainer.build_model(cfg).eval()
        if not hasattr(built, "propose"):
            raise UsageError(f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has no RPN that proposes.")
        model = cast("OpenVocabularyRCNN", built)
        AtomicCheckpointer(model).load_all(cfg.MODEL.WEIGHTS)
        if not model.vocabulary.from_checkpoint:
            raise DataError(
                f"{cfg.MODEL.WEIGHTS} does not record the classes it was trained on: use a detector that "
                "ovdet2 trained."
            )
        split = split_of(dataset)
        if split is None:
            raise UsageError(f"{dataset} has no base and novel classes: name a data set registered by ovdet2.")
        leaked = sorted({clean_name(name) for _, name in split.novel} & model.vocabulary.trained_base_names)
        if leaked:
            raise DataError(
                f"{cfg.MODEL.WEIGHTS} was trained with boxes of {', '.join(leaked[:5])}, novel classes of "
                f"{split.name}: take proposals of a detector trained on its base classes only."
            )
        return cls(cfg, model)

    def recipe(self) -> dict[str, Any]:
        """The manifest's description of the source of the boxes."""
        cfg = self.cfg
        rpn, anchors, min_size = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR, cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE
        # Without the word embeddings: they do not affect proposals, and differ in their last digits between machines.
        parts = ("backbone.", "proposal_generator.")
        proposing = {name: tensor for name, tensor in self.model.state_dict().items() if name.startswith(parts)}
        return {
            "source": "proposals",
            "proposer_sha256": state_dict_sha256(proposing),
            "input": [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT],
            "pixels": [list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)],
            "anchors": {"sizes": anchors.SIZES, "ratios": anchors.ASPECT_RATIOS, "offset": anchors.OFFSET},
            "per_level": {"top": rpn.PRE_NMS_TOPK_TEST, "nms": rpn.NMS_THRESH, "min_size": min_size},
            "all_levels": rpn.POST_NMS_TOPK_TEST,
        }

    def prepare(self, rgb: np.ndarray) -> torch.Tensor:
        """The network input of an image, made where it is decoded: array [H, W, 3] RGB -> Tensor [3, h, w] uint8."""
        resized = self._resize.get_transform(rgb).apply_image(rgb)
        image = torch.from_numpy(resized.copy()).permute(2, 0, 1)
        return image.flip(0) if self._bgr else image

    @torch.no_grad()
    def __call__(self, record: Mapping[str, Any], prepared: torch.Tensor) -> FoundBoxes:
        """The proposals of an image.

        Args:
            record: with "height" and "width" of the original image.
            prepared: what :meth:`prepare` gave.
        """
        found = self.model.propose([{"image": prepared, "height": record["height"], "width": record["width"]}])[0]
        boxes = found.proposal_boxes.tensor.float().cpu()
        return FoundBoxes(boxes, found.objectness_logits.float().sigmoid().cpu(), torch.full((len(boxes),), -1))
