"""CLIP-DETR: AlignNet and dynamic queries, two training losses that do not change the detector at test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method
from ovdet2.errors import UsageError

if TYPE_CHECKING:
    from ovdet2.methods.clip_detr.part import CLIPDETR
    from ovdet2.modeling.host import Host


class CLIPDETRMethod(Method):
    """AlignNet and dynamic queries on Deformable DETR, for training only."""

    name = "clip_detr"
    hosts = ("OpenVocabularyDeformableDETR",)
    training_only = True

    def add_keys(self, cfg: CfgNode) -> None:
        """MODEL.CLIP_DETR.*"""
        # CLIP-DETR: losses of training that change nothing at test.
        cfg.MODEL.CLIP_DETR = CN()
        # Weight of AlignNet's loss; 0: off.
        cfg.MODEL.CLIP_DETR.ALIGN_WEIGHT = 0.0
        # What the detector's loss weights are multiplied by for the dynamic queries; 0: there are none.
        cfg.MODEL.CLIP_DETR.DYNAMIC_WEIGHT = 0.0
        # Attributes of an object: "label", "label+scale" (width and height, too) or "label+box".
        cfg.MODEL.CLIP_DETR.ATTRIBUTES = "label+scale"
        # Vocabulary file, of any teacher, that has the base words and is used only for the attributes; empty: the
        # detector's own embeddings are.
        cfg.MODEL.CLIP_DETR.LABEL_TABLE = ""
        # Bins per side in which AlignNet pools an object on each level.
        cfg.MODEL.CLIP_DETR.ROI_SIZE = 7
        # AlignNet, objects that are no negatives of each other: "none", as in the paper; "near", those of one label and
        # nearly one size; "label", all of one label.
        cfg.MODEL.CLIP_DETR.IGNORED_PAIRS = "none"
        # AlignNet: over the objects of all processes.
        cfg.MODEL.CLIP_DETR.GATHER = False
        # Share of noise in the content of dynamic queries, one number for each set.
        cfg.MODEL.CLIP_DETR.BETAS = [0.1, 0.3, 0.5, 0.7, 0.9]
        # Bound of the noise of the boxes of dynamic queries.
        cfg.MODEL.CLIP_DETR.RHO = 1.0
        # How boxes are noised: "literal", the paper's Eq. 7: right, down and larger; "signed": the same in both
        # directions; "corners": DINO's rule, each corner coordinate by up to RHO half sides in both directions.
        cfg.MODEL.CLIP_DETR.SHIFT = "literal"
        # Objects of an image that have dynamic queries, drawn at random if there are more.
        cfg.MODEL.CLIP_DETR.MAX_OBJECTS = 100

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether a weight is above 0."""
        return bool(cfg.MODEL.CLIP_DETR.ALIGN_WEIGHT or cfg.MODEL.CLIP_DETR.DYNAMIC_WEIGHT)

    def check(self, cfg: CfgNode) -> None:
        """Refuse negative weights and an unknown SHIFT."""
        clip = cfg.MODEL.CLIP_DETR
        if min(clip.ALIGN_WEIGHT, clip.DYNAMIC_WEIGHT) < 0:
            raise UsageError(
                f"MODEL.CLIP_DETR has ALIGN_WEIGHT {clip.ALIGN_WEIGHT} and DYNAMIC_WEIGHT {clip.DYNAMIC_WEIGHT}: "
                "weights must not be negative."
            )
        if clip.SHIFT not in ("literal", "signed", "corners"):
            raise UsageError(f'MODEL.CLIP_DETR.SHIFT is {clip.SHIFT!r}: choose "literal", "signed" or "corners".')

    def build(self, cfg: CfgNode, host: Host) -> CLIPDETR | None:
        """See :func:`~ovdet2.methods.clip_detr.build.build_clip_detr`."""
        from ovdet2.methods.clip_detr.build import build_clip_detr

        return build_clip_detr(cfg, host)

    def for_evaluation(self, cfg: CfgNode) -> None:
        """Set both weights to 0, so that no part is built."""
        cfg.MODEL.CLIP_DETR.ALIGN_WEIGHT = cfg.MODEL.CLIP_DETR.DYNAMIC_WEIGHT = 0.0


METHOD = CLIPDETRMethod()
