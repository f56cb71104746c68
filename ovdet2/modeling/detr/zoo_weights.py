"""Convert a published Deformable DETR of COCO to a checkpoint that needs no data set: its weights and its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor

from ovdet2.errors import DataError
from ovdet2.modeling.build import build_teacher
from ovdet2.modeling.detr.import_weights import import_weights
from ovdet2.vocabulary import Vocabulary, manifest_bytes
from ovdet2.vocabulary.word_lists import named_words


def closed_coco(
    weights: Mapping[str, Any], cfg: CfgNode, *, variant: str, num_queries: int | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint from published weights, whose class layers have a row per COCO category id.

    Args:
        weights: dict of name to tensor, official or of ``transformers``.
        cfg: configuration of the detector; its teacher embeds the 80 names, which the closed class layers do not read.
        variant: of :data:`~ovdet2.modeling.detr.transformer.VARIANTS`, that the file must be.
        num_queries: keep only the first learned queries; None: all.

    Returns:
        dict of name to tensor: "network.*" and "vocabulary.*".

    Raises:
        DataError: see :func:`~ovdet2.modeling.detr.import_weights.import_weights`; or the file is of another variant.
    """
    words = named_words("coco")
    assert words.category_ids is not None
    rows = [int(number) for number in words.category_ids]
    imported, found = import_weights(weights, rows, num_queries)
    if found != variant:
        raise DataError(
            f"the file is a Deformable DETR of the variant {found!r}, not {variant!r}: it is another model's."
        )
    base = [True] * len(words.names)
    vocabulary = Vocabulary.build(
        words.names, build_teacher(cfg), cfg.MODEL.VOCABULARY.TEMPLATES, base, words.category_ids
    )
    return {f"network.{name}": value for name, value in imported.items()} | {
        "vocabulary.embeddings": vocabulary.embeddings,
        "vocabulary.base_mask": vocabulary.base_mask,
        "vocabulary.manifest": manifest_bytes(vocabulary),
    }
