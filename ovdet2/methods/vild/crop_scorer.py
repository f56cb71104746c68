"""CLIP scores of cropped regions as secondary scores: the "CLIP on cropped regions" reference of the ViLD paper.

Shapes: R proposals, K words, H x W network input. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ovdet2.layers import column_probabilities
from ovdet2.vlm.crops import embed_regions
from ovdet2.vlm.fingerprint import require_same_teacher

if TYPE_CHECKING:
    from ovdet2.vlm.teacher import Teacher
    from ovdet2.vocabulary.bank import WordBank


class CropScorer(nn.Module):
    """Scores proposals by the teacher's embeddings of their crops (1x and 1.5x). Slow: one CLIP pass per crop."""

    def __init__(self, teacher: Teacher, vocabulary: WordBank, input_format: str) -> None:
        """
        Args:
            teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
            vocabulary: :class:`~ovdet2.vocabulary.bank.WordBank` of the same teacher.
            input_format: "RGB" or "BGR", channel order of the network input.

        Raises:
            DataError: the vocabulary is of another teacher.
        """
        super().__init__()
        require_same_teacher(teacher.fingerprint, "MODEL.TEACHER", vocabulary.teacher, "the vocabulary")
        # Tuples hide the teacher and the shared buffer from state_dict: they are not weights of this detector.
        self._frozen = (teacher, vocabulary)
        self.input_format = input_format

    @torch.no_grad()
    def forward(self, image: Tensor, boxes_xyxy: Tensor) -> Tensor:
        """
        Args:
            image: Tensor [3, H, W] uint8, network input before normalisation.
            boxes_xyxy: Tensor [R, 4], in pixels of ``image``.

        Returns:
            Tensor [R, K]: softmax over the vocabulary of cosine times the teacher's logit scale.
        """
        teacher, vocabulary = self._frozen
        teacher = teacher.to(boxes_xyxy.device)
        rgb = image.to(boxes_xyxy.device)
        if self.input_format == "BGR":
            rgb = rgb.flip(0)
        embeddings = teacher.logit_scale * embed_regions(teacher, rgb, boxes_xyxy)
        return column_probabilities(embeddings, vocabulary.rows(training=False), 1.0, vocabulary.best_names)
