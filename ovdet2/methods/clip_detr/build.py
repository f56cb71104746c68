"""Build the part of CLIP-DETR from MODEL.CLIP_DETR.*."""

import logging
from dataclasses import replace

import torch
from detectron2.config import CfgNode

from ovdet2.errors import DataError
from ovdet2.methods.clip_detr.align_net import AlignNet
from ovdet2.methods.clip_detr.dynamic_queries import BoxEncoder, DynamicQueries
from ovdet2.methods.clip_detr.object_attributes import ObjectAttributes
from ovdet2.methods.clip_detr.part import CLIPDETR
from ovdet2.modeling.detr.build import loss_weights
from ovdet2.modeling.host import Host
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank
from ovdet2.vocabulary.templates import clean_name

logger = logging.getLogger(__name__)


def build_clip_detr(cfg: CfgNode, host: Host) -> CLIPDETR | None:
    """Build AlignNet and dynamic queries, for training only; None if both weights are 0.

    A vocabulary without base words, such as that of a transfer data set, is only evaluated: no label table is read.

    Args:
        cfg: configuration.
        host: DETR host.

    Raises:
        UsageError: a setting is invalid.
        DataError: see :func:`label_table`.
    """
    clip, dim = cfg.MODEL.CLIP_DETR, cfg.MODEL.DETR.DIM
    if not clip.ALIGN_WEIGHT and not clip.DYNAMIC_WEIGHT:
        return None
    table = None
    if clip.LABEL_TABLE and host.bank.words.num_base:
        table = WordBank(label_table(clip.LABEL_TABLE, host.bank.words.base()))
    attributes = ObjectAttributes(dim, host.bank, clip.ATTRIBUTES, table)
    align_net = dynamic_queries = None
    if clip.ALIGN_WEIGHT:
        assert host.network is not None  # CLIP-DETR is of the DETR host only
        align_net = AlignNet(host.network.strides, clip.ROI_SIZE, clip.IGNORED_PAIRS, clip.GATHER)
    if clip.DYNAMIC_WEIGHT:
        learned_positions = cfg.MODEL.DETR.VARIANT in ("one_stage", "refine")
        dynamic_queries = DynamicQueries(
            clip.BETAS,
            clip.RHO,
            clip.SHIFT,
            clip.MAX_OBJECTS,
            BoxEncoder(dim) if learned_positions else None,
        )
    return CLIPDETR(attributes, align_net, dynamic_queries, clip_detr_weights(cfg))


def clip_detr_weights(cfg: CfgNode) -> dict[str, float]:
    """Loss weights by kind: AlignNet's, and for dynamic queries the detector's times DYNAMIC_WEIGHT."""
    clip = cfg.MODEL.CLIP_DETR
    dynamic = {f"{name}_dynamic": clip.DYNAMIC_WEIGHT * weight for name, weight in loss_weights(cfg).items()}
    return {"loss_align": clip.ALIGN_WEIGHT, **dynamic}


def label_table(path: str, base: Vocabulary) -> Vocabulary:
    """The base words with the embeddings of a vocabulary file, which may be of another teacher.

    Args:
        path: vocabulary file; words are compared by their cleaned names, words that are not base words are ignored.
        base: :class:`Vocabulary` of the base words.

    Returns:
        :class:`Vocabulary` of the same words in the same order, all base.

    Raises:
        DataError: the file cannot be read, or it lacks base words.
    """
    table = Vocabulary.load(path)
    rows = {clean_name(name): row for row, name in enumerate(table.names)}
    missing = [name for name in base.names if clean_name(name) not in rows]
    if missing:
        raise DataError(
            f"the label table {path} lacks {len(missing)} of the {len(base)} base words, such as "
            f"{', '.join(missing[:5])}: build it with ovdet2 vocab --dataset of the test set."
        )
    chosen = [rows[clean_name(name)] for name in base.names]
    logger.info("CLIP-DETR: object attributes use the embeddings of %s, of %s.", path, table.teacher)
    return replace(
        table,
        names=base.names,
        base_mask=torch.ones(len(base), dtype=torch.bool),
        embeddings=table.embeddings[chosen],
        category_ids=base.category_ids,
        synonyms=table.synonyms and tuple(table.synonyms[row] for row in chosen),
    )
