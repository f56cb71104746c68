"""F-VLM: a Faster R-CNN on a frozen CLIP, whose scores are fused with CLIP's own at test. Wiring only.

Shapes: R proposals, K words.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY

from ovdet2.errors import UsageError
from ovdet2.layers import column_probabilities
from ovdet2.modeling.backbone.clip_pyramid import ALL_FROZEN
from ovdet2.modeling.build import build_teacher
from ovdet2.modeling.meta_arch.open_vocabulary_rcnn import OpenVocabularyRCNN
from ovdet2.vlm.fingerprint import require_same_teacher


@META_ARCH_REGISTRY.register()
class FrozenVLMRCNN(OpenVocabularyRCNN):
    """F-VLM (Kuo et al., ICLR 2023), and F-ViT (CLIM, CLIPSelf) on a ViT.

    The trunk is the teacher's image tower and stays as it is, so its last map still means what CLIP's words mean: at
    test a proposal is pooled from it as CLIP would pool an image, and compared with the words. Training and the rest of
    testing are :class:`OpenVocabularyRCNN`'s.
    """

    @configurable
    def __init__(self, *, vlm_temperature=None, **kwargs):
        """
        Args:
            vlm_temperature: tau of CLIP's score; None: CLIP is not asked.
            kwargs: of :class:`OpenVocabularyRCNN`; the backbone is a
                :class:`~ovdet2.modeling.backbone.CLIPPyramid`. If CLIP is asked, the vocabulary has a ``background``.
        """
        super().__init__(**kwargs)
        self.vlm_temperature = vlm_temperature

    @classmethod
    def from_config(cls, cfg, vocabulary=None):
        """As of :class:`OpenVocabularyRCNN`.

        Raises:
            UsageError: the backbone is no CLIP pyramid, or CLIP is asked although its trunk is trained.
            DataError: the vocabulary is of another teacher than the trunk.
        """
        _require_consistent(cfg)
        arguments = super().from_config(cfg, vocabulary)
        words = arguments["roi_heads"].box_predictor.cls_score.vocabulary.words
        trunk = build_teacher(cfg).fingerprint
        require_same_teacher(trunk, "the trunk (MODEL.TEACHER)", words.teacher, "the vocabulary")
        asks_clip = cfg.MODEL.OVD.SECONDARY_SCORES == "map"
        return arguments | {"vlm_temperature": cfg.MODEL.FVLM.TEMPERATURE if asks_clip else None}

    def ask_second_branch(self, batched_inputs, features, proposals):
        """CLIP's probabilities [R, K + 1] of the proposals, background last; see :class:`OpenVocabularyRCNN`."""
        if self.vlm_temperature is None:
            super().ask_second_branch(batched_inputs, features, proposals)
            return
        embeddings = self.backbone.embed_regions(features, [found.proposal_boxes.tensor for found in proposals])
        columns = torch.cat([self.vocabulary.embeddings, self.vocabulary.background[None]])
        probs = column_probabilities(embeddings, columns, self.vlm_temperature)
        for found, of_image in zip(proposals, probs.split([len(found) for found in proposals])):
            found.secondary_probs = of_image


def _require_consistent(cfg):
    """Refuse a trunk that is not CLIP, or no longer.

    Raises:
        UsageError: names the keys.
    """
    backbone = cfg.MODEL.BACKBONE
    if backbone.NAME != "build_clip_fpn_backbone":
        raise UsageError(
            f"FrozenVLMRCNN has CLIP's image tower as its trunk, not {backbone.NAME}: set MODEL.BACKBONE.NAME to "
            "build_clip_fpn_backbone."
        )
    if cfg.MODEL.OVD.SECONDARY_SCORES == "map" and backbone.FREEZE_AT < ALL_FROZEN:
        raise UsageError(
            f'MODEL.OVD.SECONDARY_SCORES "map" reads a trunk that training must not change: set MODEL.BACKBONE.FREEZE_AT '
            f"to {ALL_FROZEN} (now {backbone.FREEZE_AT})."
        )
    if cfg.MODEL.FVLM.TEMPERATURE <= 0:
        raise UsageError(f"MODEL.FVLM.TEMPERATURE is {cfg.MODEL.FVLM.TEMPERATURE}: it must be above 0.")
