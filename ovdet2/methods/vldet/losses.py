"""VLDet's losses: terms of a :class:`WeakPart`, and the step that finds nouns in captions."""

from __future__ import annotations

from detectron2.config import CfgNode

from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps.step import Step
from ovdet2.data.steps.texts import ImageTexts, text_steps
from ovdet2.modeling.build import build_teacher, dataset_split
from ovdet2.modeling.host import Host
from ovdet2.modeling.weak import Term, WeakPart
from ovdet2.modeling.weak.region_word import NounLoss, TextLogits
from ovdet2.modeling.weak.samplers import TopK
from ovdet2.modeling.weak.terms import caption_term, own_bias_of, text_classifier_of
from ovdet2.vocabulary import Vocabulary, read_words
from ovdet2.vocabulary.templates import clean_name


class VLDetTexts(ImageTexts):
    """Tags are indices of :func:`nouns`."""


def nouns(cfg: CfgNode) -> list[tuple[str, ...]]:
    """The nouns of MODEL.VLDET.NOUNS with their synonyms, or the words of the data set.

    Raises:
        UsageError, DataError: the list cannot be read.
    """
    if not cfg.MODEL.VLDET.NOUNS:
        return [(name,) for name in dataset_split(cfg).names]
    listed = read_words(cfg.MODEL.VLDET.NOUNS)
    further = listed.synonyms or ((),) * len(listed.names)
    return [(name, *synonyms) for name, synonyms in zip(listed.names, further)]


def names_novel_classes(cfg: CfgNode) -> bool:
    """Whether a noun or a synonym is the name of a novel class of the data set."""
    split = dataset_split(cfg)
    novel = {clean_name(name) for name in split.names[len(split.base) :]}
    return any(clean_name(name) in novel for names in nouns(cfg) for name in names)


def vldet_steps(cfg: CfgNode, source: SourceSpec) -> list[Step]:
    """See :func:`~ovdet2.data.steps.texts.text_steps`."""
    return text_steps(cfg, cfg.MODEL.VLDET, "MODEL.VLDET", source, nouns(cfg), VLDetTexts)


def build_part(cfg: CfgNode, host: Host) -> WeakPart:
    """The part of a configuration with MODEL.VLDET.NOUN_WEIGHT above 0."""
    vldet = cfg.MODEL.VLDET
    logits = TextLogits(text_classifier_of(host), own_bias_of(vldet))
    terms = {"loss_nouns": Term(vldet.NOUN_WEIGHT, TopK(vldet.PROPOSALS), NounLoss(logits))}
    if vldet.CAPTION_WEIGHT > 0:
        terms["loss_noun_captions"] = caption_term(vldet, host)

    def embed(names):
        return Vocabulary.build(tuple(names), build_teacher(cfg), vldet.TEMPLATES).embeddings

    return WeakPart(terms, VLDetTexts, embed)
