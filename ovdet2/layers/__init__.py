"""Layers without configuration: each is built from modules, tensors and numbers."""

from ovdet2.layers.attention_pool import attention_pool, attention_pool_regions
from ovdet2.layers.class_wise_nms import class_wise_nms
from ovdet2.layers.score_fusion import fuse_scores, fusion_exponents
from ovdet2.layers.text_classifier import (
    ClosedSetClassifier,
    TextBackgroundClassifier,
    TextClassifier,
    column_probabilities,
)
from ovdet2.layers.vocabulary_buffer import VocabularyBuffer

__all__ = [
    "ClosedSetClassifier",
    "TextBackgroundClassifier",
    "TextClassifier",
    "VocabularyBuffer",
    "attention_pool",
    "attention_pool_regions",
    "class_wise_nms",
    "column_probabilities",
    "fuse_scores",
    "fusion_exponents",
]
