"""F-VLM on a frozen CLIP trunk: the secondary scores "map".

Shapes: R proposals, K words, D embedding dimension. Names: ``_probs`` probabilities in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ovdet2.layers import column_probabilities
from ovdet2.modeling.backbone import CLIPPyramid
from ovdet2.modeling.rcnn.part import RCNNPart, RegionBatch

if TYPE_CHECKING:
    from ovdet2.vocabulary.bank import WordBank


class FVLMPart(RCNNPart):
    """CLIP's class probabilities of proposals, pooled from the trunk's last map. It has no weights."""

    reads_frozen_trunk = True

    def __init__(self, backbone: CLIPPyramid, bank: WordBank, temperature: float) -> None:
        """
        Args:
            backbone: the detector's backbone.
            bank: the detector's word bank, with a ``background``.
            temperature: tau_v of the softmax, above 0.
        """
        super().__init__()
        # A tuple hides the detector's modules from state_dict.
        self._of_detector = (backbone, bank)
        self.temperature = temperature

    def secondary_probs(self, batch: RegionBatch) -> list[Tensor]:
        """Probabilities [R_i, K + 1] of the proposals of each image, background last."""
        backbone, bank = self._of_detector
        background = bank.background
        assert background is not None  # F-VLM requires it
        boxes = [of_image.proposal_boxes.tensor for of_image in batch.proposals]
        embeddings = backbone.embed_regions(batch.features, boxes)  # [R, D]
        columns = torch.cat([bank.rows(training=False), background[None]])
        probs = column_probabilities(embeddings, columns, self.temperature, bank.best_names)
        return list(probs.split(batch.counts))
