"""Detic (Zhou et al., ECCV 2022): networks that classify regions by words. See README.md."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method
from ovdet2.errors import UsageError

# RoI heads: the proposals whose scores they read.
_HEADS = {"DeticCascadeROIHeads": "CenterNetProposals", "DeticRes5ROIHeads": "RPN"}


class Detic(Method):
    """The detectors that Detic, CoDet and VLDet share, for published weights; they are not trained here."""

    name = "detic"
    hosts = ("OpenVocabularyRCNN",)

    def add_keys(self, cfg: CfgNode) -> None:
        """MODEL.DETIC.*"""
        # Networks of Detic; switched on by MODEL.ROI_HEADS.NAME "DeticCascadeROIHeads" (LVIS) or "DeticRes5ROIHeads" (COCO).
        cfg.MODEL.DETIC = CN()
        # timm name of the trunk of MODEL.BACKBONE.NAME "build_detic_fpn_backbone": "resnet18", "resnet50",
        # "convnext_tiny", "swin_base_patch4_window7_224", or another ResNet, ConvNeXt or Swin Transformer.
        cfg.MODEL.DETIC.TRUNK = "resnet50"
        # "CenterNetProposals" drops cells whose heat is at or below this probability. MODEL.RPN has its other keys:
        # IN_FEATURES, PRE_NMS_TOPK_TEST (for each level), NMS_THRESH and POST_NMS_TOPK_TEST.
        cfg.MODEL.DETIC.PROPOSAL_SCORE_THRESH = 0.0001

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether the RoI heads are Detic's."""
        return cfg.MODEL.ROI_HEADS.NAME in _HEADS

    def check(self, cfg: CfgNode) -> None:
        """Refuse settings that the networks do not read.

        Raises:
            UsageError: such a setting; the message names its key.
        """
        model = cfg.MODEL
        if not self.is_on(cfg):
            return
        if (model.OVD.CLASSIFIER, model.OVD.CLS_LOSS) != ("text", "sigmoid"):
            raise UsageError(
                f"MODEL.OVD.CLASSIFIER is {model.OVD.CLASSIFIER!r} and CLS_LOSS {model.OVD.CLS_LOSS!r}: Detic has a sigmoid "
                'for each word, set them to "text" and "sigmoid".'
            )
        if model.OVD.SECONDARY_SCORES != "none":
            raise UsageError("Detic has no secondary scores: set MODEL.OVD.SECONDARY_SCORES to none.")
        if model.MASK_ON and not model.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
            raise UsageError(
                "class-specific masks are not available for novel words: set MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK to True."
            )
        proposals = _HEADS[model.ROI_HEADS.NAME]
        if model.PROPOSAL_GENERATOR.NAME != proposals:
            raise UsageError(
                f"MODEL.PROPOSAL_GENERATOR.NAME is {model.PROPOSAL_GENERATOR.NAME}: {model.ROI_HEADS.NAME} takes the proposals "
                f'of "{proposals}".'
            )
        if not 0 <= model.DETIC.PROPOSAL_SCORE_THRESH < 1:
            raise UsageError(
                f"MODEL.DETIC.PROPOSAL_SCORE_THRESH is {model.DETIC.PROPOSAL_SCORE_THRESH}: it is a probability in [0, 1)."
            )

    def register(self) -> None:
        """Import the trunks, the proposals and the RoI heads."""
        from ovdet2.methods.detic import cascade, centernet, res5, trunk  # noqa: F401


METHOD = Detic()
