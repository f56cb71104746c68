"""VLDet (Lin et al., ICLR 2023): nouns of a caption are assigned to regions one to one. See README.md."""

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


class VLDet(Method):
    """The loss of nouns, and Detic's loss of captions, for any two-stage detector."""

    name = "vldet"
    hosts = ("OpenVocabularyRCNN",)
    training_only = True

    def add_keys(self, cfg: CfgNode) -> None:
        """MODEL.VLDET.*"""
        # Nouns of captions, assigned to regions (Hungarian matching).
        cfg.MODEL.VLDET = CN()
        # Weight of the loss of nouns (0.01 in VLDet); 0: off.
        cfg.MODEL.VLDET.NOUN_WEIGHT = 0.0
        # Best proposals of an image that its nouns are assigned to.
        cfg.MODEL.VLDET.PROPOSALS = 32
        # A list of nouns (.txt or .json, as of ovdet2 vocab) that are found in captions; "": the words of the data set,
        # novel ones included.
        cfg.MODEL.VLDET.NOUNS = ""
        # Prompt template set of the nouns.
        cfg.MODEL.VLDET.TEMPLATES = "single"
        add_text_keys(cfg.MODEL.VLDET)

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether it has a loss."""
        return cfg.MODEL.VLDET.NOUN_WEIGHT > 0

    def check(self, cfg: CfgNode) -> None:
        """Refuse settings without effect.

        Raises:
            UsageError: such a setting; the message names its key.
        """
        vldet = cfg.MODEL.VLDET
        check_text_keys(cfg, vldet, "MODEL.VLDET", self.is_on(cfg))
        if vldet.NOUN_WEIGHT < 0 or vldet.PROPOSALS < 1:
            raise UsageError(
                f"MODEL.VLDET.NOUN_WEIGHT is {vldet.NOUN_WEIGHT} and PROPOSALS {vldet.PROPOSALS}: give at least 0 and 1."
            )
        if vldet.CAPTION_WEIGHT > 0 and not self.is_on(cfg):
            raise UsageError(
                "MODEL.VLDET.CAPTION_WEIGHT is set and NOUN_WEIGHT is 0: for captions only, use MODEL.DETIC.CAPTION_WEIGHT."
            )

    def names_novel_classes(self, cfg: CfgNode) -> bool:
        """Whether a novel class of the data set is among the nouns."""
        from ovdet2.methods.vldet.losses import names_novel_classes

        return names_novel_classes(cfg)

    def steps(self, cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
        """A step that attaches nouns and a caption embedding to training images without boxes."""
        from ovdet2.methods.vldet.losses import vldet_steps

        return vldet_steps(cfg, source) if is_train and self.is_on(cfg) else []

    def build(self, cfg: CfgNode, host: Host) -> WeakPart | None:
        """The part with the losses on images without boxes; None without."""
        from ovdet2.methods.vldet.losses import build_part

        return build_part(cfg, host) if self.is_on(cfg) else None


METHOD = VLDet()
