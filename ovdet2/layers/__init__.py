"""Layers that read no configuration: each is built from modules, tensors and numbers."""

from ovdet2.layers.class_wise_nms import class_wise_nms
from ovdet2.layers.closed_set_classifier import ClosedSetClassifier
from ovdet2.layers.cosine_classifier import CosineClassifier, EmbeddingProjection, column_probabilities, cosine_logits
from ovdet2.layers.score_fusion import fuse_scores, fusion_exponents

__all__ = [
    "ClosedSetClassifier",
    "CosineClassifier",
    "EmbeddingProjection",
    "class_wise_nms",
    "column_probabilities",
    "cosine_logits",
    "fuse_scores",
    "fusion_exponents",
]
