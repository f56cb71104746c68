"""From MODEL.CLIP_DETR.* to the parts of CLIP-DETR."""

import logging
from dataclasses import replace

import torch

from ovdet2.errors import DataError, UsageError
from ovdet2.methods.clip_detr.align_net import AlignNet
from ovdet2.methods.clip_detr.dynamic_queries import BoxEncoder, DynamicQueries
from ovdet2.methods.clip_detr.object_attributes import ObjectAttributes
from ovdet2.methods.clip_detr.part import CLIPDETR
from ovdet2.modeling.detr.build import loss_weights
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank
from ovdet2.vocabulary.templates import clean_name

logger = logging.getLogger(__name__)


def build_clip_detr(cfg, network, vocabulary):
    """The training-only parts, or None where both weights are 0.

    A vocabulary without base words, such as a transfer target's, is for evaluation alone: no table is read.

    Args:
        cfg: configuration.
        network: :class:`~ovdet2.modeling.detr.model.DeformableDETR` of the detector.
        vocabulary: its :class:`~ovdet2.layers.WordBank`.

    Raises:
        UsageError: a negative weight, or a setting that the parts refuse.
        DataError: see :func:`label_table`.
    """
    clip, dim = cfg.MODEL.CLIP_DETR, cfg.MODEL.DETR.DIM
    if min(clip.ALIGN_WEIGHT, clip.DYNAMIC_WEIGHT) < 0:
        raise UsageError(
            f"MODEL.CLIP_DETR has ALIGN_WEIGHT {clip.ALIGN_WEIGHT} and DYNAMIC_WEIGHT {clip.DYNAMIC_WEIGHT}: no weight "
            "is below 0."
        )
    if clip.SHIFT not in ("signed", "literal"):
        raise UsageError(f'MODEL.CLIP_DETR.SHIFT is {clip.SHIFT!r}: choose "signed" or "literal".')
    if not clip.ALIGN_WEIGHT and not clip.DYNAMIC_WEIGHT:
        return None
    table = None
    if clip.LABEL_TABLE and vocabulary.words.num_base:
        table = WordBank(label_table(clip.LABEL_TABLE, vocabulary.words.base()))
    attributes = ObjectAttributes(dim, vocabulary, clip.ATTRIBUTES, table)
    align_net = dynamic_queries = None
    if clip.ALIGN_WEIGHT:
        align_net = AlignNet(network.strides, clip.ROI_SIZE, clip.IGNORED_PAIRS, clip.GATHER)
    if clip.DYNAMIC_WEIGHT:
        learned_positions = cfg.MODEL.DETR.VARIANT in ("one_stage", "refine")
        dynamic_queries = DynamicQueries(
            clip.BETAS,
            clip.RHO,
            clip.SHIFT == "signed",
            clip.MAX_OBJECTS,
            BoxEncoder(dim) if learned_positions else None,
        )
    return CLIPDETR(attributes, align_net, dynamic_queries)


def clip_detr_weights(cfg):
    """Weights by kind of loss: AlignNet's, and the detector's times DYNAMIC_WEIGHT."""
    clip = cfg.MODEL.CLIP_DETR
    dynamic = {f"{name}_dynamic": clip.DYNAMIC_WEIGHT * weight for name, weight in loss_weights(cfg).items()}
    return {"loss_align": clip.ALIGN_WEIGHT, **dynamic}


def label_table(path, base):
    """The base words with the embeddings of a vocabulary file, which may be of another teacher.

    Args:
        path: vocabulary file; its words are compared by their cleaned names, others than the base words are left out.
        base: :class:`Vocabulary` of the base words.

    Returns:
        :class:`Vocabulary` of the same words in the same order, all base.

    Raises:
        DataError: the file cannot be read, or base words are not in it.
    """
    table = Vocabulary.load(path)
    rows = {clean_name(name): row for row, name in enumerate(table.names)}
    missing = [name for name in base.names if clean_name(name) not in rows]
    if missing:
        raise DataError(
            f"the label table {path} lacks {len(missing)} of the {len(base)} base words, such as "
            f"{', '.join(missing[:5])}: build it with tools/build_vocabulary.py --dataset of the test set."
        )
    chosen = [rows[clean_name(name)] for name in base.names]
    logger.info("CLIP-DETR: attributes of objects are looked up in %s, of %s.", path, table.teacher)
    return replace(
        table,
        names=base.names,
        base_mask=torch.ones(len(base), dtype=torch.bool),
        embeddings=table.embeddings[chosen],
        category_ids=base.category_ids,
        synonyms=table.synonyms and tuple(table.synonyms[row] for row in chosen),
    )
