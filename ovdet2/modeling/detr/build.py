"""Build network, criterion, post-processing and parts of a Deformable DETR from MODEL.DETR.*."""

from collections.abc import Iterable, Sequence
from typing import cast

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from ovdet2.config.method import Method
from ovdet2.errors import UsageError
from ovdet2.layers.ms_deform_attn import KERNELS, MultiScaleDeformableAttention
from ovdet2.modeling.detr.criterion import SetCriterion
from ovdet2.modeling.detr.heads import ClosedSetBranch, TextBranch
from ovdet2.modeling.detr.matcher import HungarianMatcher, MatchingCost
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.part import DetrPart
from ovdet2.modeling.detr.postprocess import PostProcessor
from ovdet2.modeling.detr.transformer import DeformableTransformer
from ovdet2.modeling.host import Host
from ovdet2.modeling.part import build_parts
from ovdet2.vocabulary.bank import WordBank

_GROUPS = 32  # groups of the neck's group norm


def build_detr(cfg: CfgNode, backbone: Backbone, vocabulary: WordBank) -> DeformableDETR:
    """Build the network, from images to logits and boxes.

    Args:
        cfg: configuration.
        backbone: Detectron2 Backbone with the maps of MODEL.DETR.IN_FEATURES.
        vocabulary: of the detector.

    Raises:
        UsageError: the backbone lacks a map, or has an unused one; sizes do not fit together; the attention kernel or
            the classifier is unknown.
    """
    detr, shapes = cfg.MODEL.DETR, cast(dict[str, ShapeSpec], backbone.output_shape())
    missing = [name for name in detr.IN_FEATURES if name not in shapes]
    if missing or not detr.IN_FEATURES or len(detr.IN_FEATURES) > detr.LEVELS:
        raise UsageError(
            f"MODEL.DETR.IN_FEATURES is {list(detr.IN_FEATURES)}: name one to {detr.LEVELS} (MODEL.DETR.LEVELS) of the "
            f"backbone's maps {', '.join(shapes)}."
        )
    surplus = [name for name in shapes if name not in detr.IN_FEATURES]
    if surplus:
        raise UsageError(
            f"the backbone returns {', '.join(surplus)}, which MODEL.DETR.IN_FEATURES {list(detr.IN_FEATURES)} does not "
            "use. Their weights would have no gradient, which stalls multi-process training. Remove them from its "
            "OUT_FEATURES."
        )
    if detr.DIM % _GROUPS or detr.DECODER_LAYERS < 1:
        raise UsageError(
            f"MODEL.DETR has DIM {detr.DIM} and DECODER_LAYERS {detr.DECODER_LAYERS}: choose a multiple of {_GROUPS} "
            "channels, for the group norm of the neck, and at least one layer."
        )
    if detr.ATTENTION_KERNEL not in ("auto", *KERNELS):
        raise UsageError(
            f"MODEL.DETR.ATTENTION_KERNEL is {detr.ATTENTION_KERNEL!r}: choose auto, {', '.join(KERNELS)}."
        )
    transformer = DeformableTransformer(
        detr.VARIANT,
        dim=detr.DIM,
        heads=detr.HEADS,
        levels=detr.LEVELS,
        points=detr.POINTS,
        ffn_dim=detr.FFN_DIM,
        dropout=detr.DROPOUT,
        encoder_layers=detr.ENCODER_LAYERS,
        decoder_layers=detr.DECODER_LAYERS,
        num_queries=detr.NUM_QUERIES,
        wide_position=detr.WIDE_POSITION,
    )
    for module in transformer.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            module.kernel = detr.ATTENTION_KERNEL
    neck = MultiScaleNeck([shapes[name].channels for name in detr.IN_FEATURES], detr.DIM, detr.LEVELS, _GROUPS)
    branches = [_class_branch(cfg, vocabulary) for _ in range(transformer.num_branches)]
    return DeformableDETR(backbone, neck, transformer, branches, detr.IN_FEATURES)


def build_detr_parts(cfg: CfgNode, methods: Sequence[Method], host: Host) -> list[DetrPart]:
    """Build the parts of a configuration's methods.

    Raises:
        UsageError: a method's part is for another kind of detector.
    """
    parts = []
    for part in build_parts(cfg, methods, host):
        if not isinstance(part, DetrPart):
            raise UsageError(
                f"the method {part.name} builds a {type(part).__name__}, which is no DetrPart: state its hosts in its "
                "METHOD, or choose another MODEL.META_ARCHITECTURE."
            )
        parts.append(part)
    return parts


def refuse_unused(cfg: CfgNode) -> None:
    """Refuse settings of the two-stage detectors, which would have no effect here.

    Raises:
        UsageError: one of them is not at its default.
    """
    ovd = cfg.MODEL.OVD
    unused = {
        "MODEL.MASK_ON": cfg.MODEL.MASK_ON,
        "MODEL.OVD.SECONDARY_SCORES": ovd.SECONDARY_SCORES != "none",
        "MODEL.OVD.SECONDARY_BACKGROUND": ovd.SECONDARY_BACKGROUND != "none",
        "MODEL.OVD.CLS_LOSS": ovd.CLS_LOSS != "softmax",
        "MODEL.OVD.CLS_LOSS_WEIGHT": ovd.CLS_LOSS_WEIGHT != 1,
        "MODEL.OVD.FEDERATED_WORDS": ovd.FEDERATED_WORDS > 0,
        "INPUT.SQUARE": cfg.INPUT.SQUARE != 0,
    }
    names = [name for name, changed in unused.items() if changed]
    if names:
        raise UsageError(f"OpenVocabularyDeformableDETR has no {', '.join(names)}: leave them at their defaults.")


def build_criterion(cfg: CfgNode, extra_costs: Iterable[MatchingCost] = ()) -> SetCriterion:
    """Build the criterion. ``extra_costs`` of parts apply to the decoder, not to the encoder's proposals."""
    detr = cfg.MODEL.DETR
    costs = (detr.CLASS_COST, detr.L1_COST, detr.GIOU_COST, detr.FOCAL_ALPHA, detr.FOCAL_GAMMA)
    return SetCriterion(
        HungarianMatcher(*costs, extra_costs),
        HungarianMatcher(*costs),
        alpha=detr.FOCAL_ALPHA,
        gamma=detr.FOCAL_GAMMA,
        auxiliary=detr.AUXILIARY_LOSSES,
    )


def build_postprocessor(cfg: CfgNode) -> PostProcessor:
    """The :class:`PostProcessor` of TEST.DETECTIONS_PER_IMAGE and MODEL.DETR.SCORE_THRESH_TEST."""
    return PostProcessor(cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.DETR.SCORE_THRESH_TEST)


def loss_weights(cfg: CfgNode) -> dict[str, float]:
    """Weights by kind of loss, as :func:`~ovdet2.modeling.detr.criterion.weighted` takes them."""
    detr = cfg.MODEL.DETR
    return {"loss_class": detr.CLASS_WEIGHT, "loss_l1": detr.L1_WEIGHT, "loss_giou": detr.GIOU_WEIGHT}


def _class_branch(cfg: CfgNode, vocabulary: WordBank) -> nn.Module:
    """Build the class branch of a decoder layer from MODEL.OVD.CLASSIFIER.

    Raises:
        UsageError: the classifier is unknown, or a closed-set classifier is given distractors.
    """
    kind = cfg.MODEL.OVD.CLASSIFIER
    if kind == "text":
        return TextBranch(cfg.MODEL.DETR.DIM, vocabulary, 1 / cfg.MODEL.OVD.TEMPERATURE)
    if kind != "closed_set":
        raise UsageError(f'MODEL.OVD.CLASSIFIER is {kind!r}: choose "text" or "closed_set".')
    if cfg.TEST.DISTRACTORS:
        raise UsageError("a closed-set head takes no TEST.DISTRACTORS: its classes are fixed.")
    return ClosedSetBranch(cfg.MODEL.DETR.DIM, len(vocabulary))
