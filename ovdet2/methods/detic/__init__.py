"""Detic (Zhou et al., ECCV 2022): words from image tags and captions, and networks for it. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method
from ovdet2.config.text_keys import add_text_keys, check_text_keys
from ovdet2.errors import UsageError

if TYPE_CHECKING:
    from ovdet2.data.source_spec import SourceSpec
    from ovdet2.data.steps.step import Step
    from ovdet2.modeling.host import Host
    from ovdet2.modeling.weak import WeakPart

# RoI heads: the proposals whose scores they read.
_HEADS = {"DeticCascadeROIHeads": "CenterNetProposals", "DeticRes5ROIHeads": "RPN"}


CONCEPTS = ("all", "base")


class Detic(Method):
    """Losses on image tags and captions, for any two-stage detector; and the detectors that Detic, CoDet and VLDet share.

    The cascade of LVIS is for published weights: it is not trained here.
    """

    name = "detic"
    hosts = ("OpenVocabularyRCNN",)
    training_only = True  # its part; the networks are not parts

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

        # Weight of the loss of image tags on the largest of the best proposals (0.1 in Detic); 0: off.
        cfg.MODEL.DETIC.TAG_WEIGHT = 0.0
        # Proposals of an image of which the largest has the tags (Detic: 32 on COCO, 128 on LVIS).
        cfg.MODEL.DETIC.TAG_PROPOSALS = 128
        # Words found in captions as tags, and negatives of each other: "all" of the data set, novel ones included (Detic),
        # or "base" ones only.
        cfg.MODEL.DETIC.CONCEPTS = "all"
        # A list of words with synonyms that tags are found by too (.txt or .json, as of ovdet2 vocab); "": names only.
        cfg.MODEL.DETIC.SYNONYMS = ""
        add_text_keys(cfg.MODEL.DETIC)

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether the RoI heads are Detic's, or it has a loss."""
        return cfg.MODEL.ROI_HEADS.NAME in _HEADS or _learns(cfg)

    def names_novel_classes(self, cfg: CfgNode) -> bool:
        """Whether tags are found by the names of novel classes."""
        return cfg.MODEL.DETIC.TAG_WEIGHT > 0 and cfg.MODEL.DETIC.CONCEPTS == "all"

    def steps(self, cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
        """A step that attaches tags and a caption embedding to training images without boxes."""
        from ovdet2.methods.detic.losses import detic_steps

        return detic_steps(cfg, source) if is_train and _learns(cfg) else []

    def build(self, cfg: CfgNode, host: Host) -> WeakPart | None:
        """The part with the losses on images without boxes; None without."""
        from ovdet2.methods.detic.losses import build_part

        return build_part(cfg, host) if _learns(cfg) else None

    def check(self, cfg: CfgNode) -> None:
        """Refuse settings that the networks do not read.

        Raises:
            UsageError: such a setting; the message names its key.
        """
        model, detic = cfg.MODEL, cfg.MODEL.DETIC
        check_text_keys(cfg, detic, "MODEL.DETIC", _learns(cfg))
        if detic.TAG_WEIGHT < 0 or detic.TAG_PROPOSALS < 1:
            raise UsageError(
                f"MODEL.DETIC.TAG_WEIGHT is {detic.TAG_WEIGHT} and TAG_PROPOSALS {detic.TAG_PROPOSALS}: give at least 0 and 1."
            )
        if detic.CONCEPTS not in CONCEPTS:
            raise UsageError(f"MODEL.DETIC.CONCEPTS is {detic.CONCEPTS!r}: choose {' or '.join(CONCEPTS)}.")
        if model.ROI_HEADS.NAME not in _HEADS:
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


def _learns(cfg: CfgNode) -> bool:
    """Whether there is a loss on images without boxes."""
    return cfg.MODEL.DETIC.TAG_WEIGHT > 0 or cfg.MODEL.DETIC.CAPTION_WEIGHT > 0


METHOD = Detic()
