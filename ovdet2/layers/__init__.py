"""Layers without configuration: each is built from modules, tensors and numbers."""

from ovdet2.layers.class_wise_nms import class_wise_nms
from ovdet2.layers.score_fusion import fuse_scores, fusion_exponents
from ovdet2.layers.text_classifier import (
    ClosedSetClassifier,
    TextBackgroundClassifier,
    TextClassifier,
    column_probabilities,
)

__all__ = [
    "ClosedSetClassifier",
    "TextBackgroundClassifier",
    "TextClassifier",
    "class_wise_nms",
    "column_probabilities",
    "fuse_scores",
    "fusion_exponents",
]
