"""A Faster R-CNN on a frozen CLIP trunk: its last map stays comparable with CLIP's word embeddings. Wiring only."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY

from ovdet2.errors import UsageError
from ovdet2.modeling.backbone.clip_pyramid import ALL_FROZEN
from ovdet2.modeling.build import build_teacher
from ovdet2.modeling.meta_arch.open_vocabulary_rcnn import OpenVocabularyRCNN
from ovdet2.vlm.fingerprint import require_same_teacher
from ovdet2.vocabulary import Vocabulary


@META_ARCH_REGISTRY.register()
class FrozenVLMRCNN(OpenVocabularyRCNN):
    """The detector of F-VLM (Kuo et al., ICLR 2023), and of F-ViT (CLIM, CLIPSelf) on a ViT.

    The trunk is the teacher's image tower, and the vocabulary is of the same teacher. If the trunk is frozen, a part
    can compute secondary scores from its last map. Training and testing are :class:`OpenVocabularyRCNN`'s.
    """

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: as of :class:`OpenVocabularyRCNN`; the backbone is a
                :class:`~ovdet2.modeling.backbone.CLIPPyramid`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, vocabulary: Vocabulary | None = None) -> dict[str, Any]:
        """As of :class:`OpenVocabularyRCNN`.

        Raises:
            UsageError: the backbone is no CLIP pyramid, or a part needs a frozen trunk but the trunk is trained.
            DataError: the vocabulary is of another teacher than the trunk.
        """
        backbone = cfg.MODEL.BACKBONE
        if backbone.NAME != "build_clip_fpn_backbone":
            raise UsageError(
                f"FrozenVLMRCNN has CLIP's image tower as its trunk, not {backbone.NAME}: set MODEL.BACKBONE.NAME to "
                "build_clip_fpn_backbone."
            )
        arguments = super().from_config(cfg, vocabulary)
        readers = [part.name for part in arguments["parts"] if part.reads_frozen_trunk]
        if readers and backbone.FREEZE_AT < ALL_FROZEN:
            raise UsageError(
                f"{' and '.join(readers)} requires a frozen trunk: set MODEL.BACKBONE.FREEZE_AT to "
                f"{ALL_FROZEN} (now {backbone.FREEZE_AT}), or MODEL.OVD.SECONDARY_SCORES to none."
            )
        words = arguments["roi_heads"].classifier.vocabulary.words
        trunk = build_teacher(cfg).fingerprint
        require_same_teacher(trunk, "the trunk (MODEL.TEACHER)", words.teacher, "the vocabulary")
        return arguments
