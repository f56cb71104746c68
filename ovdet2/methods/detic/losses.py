"""Detic's losses on image tags and captions: terms of a :class:`WeakPart`, and the step that finds their texts.

Shapes: K words, D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps.step import Step
from ovdet2.data.steps.texts import ImageTexts, text_steps
from ovdet2.errors import UsageError, did_you_mean
from ovdet2.modeling.build import dataset_split
from ovdet2.modeling.host import Host
from ovdet2.modeling.weak import Term, WeakPart
from ovdet2.modeling.weak.region_word import TagLoss, TextLogits
from ovdet2.modeling.weak.samplers import MaxSize
from ovdet2.modeling.weak.terms import caption_term, own_bias_of, text_classifier_of
from ovdet2.vocabulary import read_words
from ovdet2.vocabulary.bank import WordBank
from ovdet2.vocabulary.templates import clean_name

GROUP = "MODEL.DETIC"


class DeticTexts(ImageTexts):
    """Tags are indices of :func:`concepts`."""


def concepts(cfg: CfgNode) -> list[tuple[str, ...]]:
    """The words of the data set that are tags, in its order, each with the synonyms of MODEL.DETIC.SYNONYMS.

    Raises:
        UsageError, DataError: the list of synonyms cannot be read, or has a word that is no class of the data set.
    """
    split, detic = dataset_split(cfg), cfg.MODEL.DETIC
    names = split.names[: len(split.base)] if detic.CONCEPTS == "base" else split.names
    if not detic.SYNONYMS:
        return [(name,) for name in names]
    listed = read_words(detic.SYNONYMS)
    classes = {clean_name(name) for name in split.names}
    unknown = [name for name in listed.names if clean_name(name) not in classes]
    if unknown:
        raise UsageError(
            f"{GROUP}.SYNONYMS has the word {unknown[0]!r}{did_you_mean(unknown[0], classes)}, which is no class of "
            f"{split.name}: remove it from {detic.SYNONYMS}."
        )
    further = {clean_name(name): of for name, of in zip(listed.names, listed.synonyms or ((),) * len(listed.names))}
    return [(name, *further.get(clean_name(name), ())) for name in names]


def detic_steps(cfg: CfgNode, source: SourceSpec) -> list[Step]:
    """See :func:`~ovdet2.data.steps.texts.text_steps`."""
    names = concepts(cfg) if cfg.MODEL.DETIC.TAG_WEIGHT > 0 else []
    return text_steps(cfg, cfg.MODEL.DETIC, GROUP, source, names, DeticTexts)


def rows_of(bank: WordBank, names: Sequence[str]) -> Tensor:
    """Embeddings [K, D] of words of the detector by their names.

    Raises:
        UsageError: a name is none of the detector's words.
    """
    known = {clean_name(name): row for row, name in enumerate(bank.names)}
    lacking = [name for name in names if clean_name(name) not in known]
    if lacking:
        raise UsageError(
            f"{len(lacking)} tags are not among the detector's {len(bank)} words, first {lacking[0]!r}: name a data set with "
            "them in DATASETS.TEST."
        )
    return bank.embeddings[torch.tensor([known[clean_name(name)] for name in names])]


def build_part(cfg: CfgNode, host: Host) -> WeakPart:
    """The part of a configuration with MODEL.DETIC.TAG_WEIGHT or CAPTION_WEIGHT above 0."""
    detic, terms = cfg.MODEL.DETIC, {}
    if detic.TAG_WEIGHT > 0:
        logits = TextLogits(text_classifier_of(host), own_bias_of(detic))
        terms["loss_tags"] = Term(detic.TAG_WEIGHT, MaxSize(detic.TAG_PROPOSALS), TagLoss(logits))
    if detic.CAPTION_WEIGHT > 0:
        terms["loss_captions"] = caption_term(detic, host)
    bank = host.bank
    return WeakPart(terms, DeticTexts, lambda names: rows_of(bank, names))
