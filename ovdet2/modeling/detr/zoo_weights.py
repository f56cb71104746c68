"""Convert a published Deformable DETR to a checkpoint that needs no data set: its weights and its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ovdet2.errors import DataError
from ovdet2.modeling.build import build_teacher
from ovdet2.modeling.detr.import_weights import import_weights, rows_of_classes
from ovdet2.vocabulary import Vocabulary, manifest_bytes
from ovdet2.vocabulary.word_lists import named_words


def closed_set(
    weights: Mapping[str, Any], cfg: CfgNode, *, variant: str, words: str = "coco", num_queries: int | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint from published weights, whose class layers have a row per class or category id.

    Args:
        weights: dict of name to tensor, official, of ``transformers``, of Detic or of detrex.
        cfg: configuration of the detector; its teacher embeds the names, which the closed class layers do not read.
        variant: of :data:`~ovdet2.modeling.detr.transformer.VARIANTS`, that the file must be.
        words: the classes, of :func:`~ovdet2.vocabulary.word_lists.named_words`.
        num_queries: keep only the first learned queries; None: all.

    Returns:
        dict of name to tensor: "network.*" and "vocabulary.*".

    Raises:
        DataError: see :func:`~ovdet2.modeling.detr.import_weights.import_weights`; or the file is of another
            variant, or of another number of classes.
    """
    classes = named_words(words)
    assert classes.category_ids is not None
    rows = rows_of_classes(weights, [int(number) for number in classes.category_ids])
    imported, found = import_weights(weights, rows, num_queries)
    if found != variant:
        raise DataError(
            f"the file is a Deformable DETR of the variant {found!r}, not {variant!r}: it is another model's."
        )
    base = [True] * len(classes.names)
    vocabulary = Vocabulary.build(
        classes.names, build_teacher(cfg), cfg.MODEL.VOCABULARY.TEMPLATES, base, classes.category_ids
    )
    return {f"network.{name}": value for name, value in imported.items()} | {
        "vocabulary.embeddings": vocabulary.embeddings,
        "vocabulary.base_mask": vocabulary.base_mask,
        "vocabulary.manifest": manifest_bytes(vocabulary),
    }
