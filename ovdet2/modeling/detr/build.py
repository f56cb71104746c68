"""From MODEL.DETR.* to the parts of the query-based detectors."""

from torch import nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.criterion import SetCriterion
from ovdet2.modeling.detr.heads import ClosedSetBranch, TextBranch
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.postprocess import PostProcessor
from ovdet2.modeling.detr.transformer import DeformableTransformer


def build_detr(cfg, backbone, vocabulary):
    """The network, from images to logits and boxes.

    Args:
        cfg: configuration.
        backbone: Detectron2 Backbone with the maps of MODEL.DETR.IN_FEATURES.
        vocabulary: :class:`~ovdet2.layers.VocabularyBuffer`.

    Raises:
        UsageError: a map that the backbone does not have, or see :func:`_class_branch`.
    """
    detr, shapes = cfg.MODEL.DETR, backbone.output_shape()
    missing = [name for name in detr.IN_FEATURES if name not in shapes]
    if missing or not detr.IN_FEATURES or len(detr.IN_FEATURES) > detr.LEVELS:
        raise UsageError(
            f"MODEL.DETR.IN_FEATURES is {list(detr.IN_FEATURES)}: name one to {detr.LEVELS} (MODEL.DETR.LEVELS) of the "
            f"backbone's maps {', '.join(shapes)}."
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
    )
    neck = MultiScaleNeck([shapes[name].channels for name in detr.IN_FEATURES], detr.DIM, detr.LEVELS)
    branches = [_class_branch(cfg, vocabulary) for _ in range(transformer.num_branches)]
    return DeformableDETR(backbone, neck, transformer, branches, detr.IN_FEATURES)


def build_criterion(cfg, extra_costs=()):
    """The criterion; ``extra_costs`` (see :class:`HungarianMatcher`) are those of a method, for the decoder alone."""
    detr = cfg.MODEL.DETR
    costs = (detr.CLASS_COST, detr.L1_COST, detr.GIOU_COST, detr.FOCAL_ALPHA, detr.FOCAL_GAMMA)
    return SetCriterion(
        HungarianMatcher(*costs, extra_costs),
        HungarianMatcher(*costs),
        alpha=detr.FOCAL_ALPHA,
        gamma=detr.FOCAL_GAMMA,
        auxiliary=detr.AUXILIARY_LOSSES,
    )


def build_postprocessor(cfg):
    """The :class:`PostProcessor` of TEST.DETECTIONS_PER_IMAGE and MODEL.DETR.SCORE_THRESH_TEST."""
    return PostProcessor(cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.DETR.SCORE_THRESH_TEST)


def loss_weights(cfg):
    """Weights by kind of loss, as :func:`~ovdet2.modeling.detr.criterion.weighted` takes them."""
    detr = cfg.MODEL.DETR
    return {"loss_class": detr.CLASS_WEIGHT, "loss_l1": detr.L1_WEIGHT, "loss_giou": detr.GIOU_WEIGHT}


def _class_branch(cfg, vocabulary) -> nn.Module:
    """The class branch of a decoder layer, of MODEL.OVD.CLASSIFIER.

    Raises:
        UsageError: another kind, or distractors for a closed set.
    """
    kind = cfg.MODEL.OVD.CLASSIFIER
    if kind == "text":
        return TextBranch(cfg.MODEL.DETR.DIM, vocabulary, 1 / cfg.MODEL.OVD.TEMPERATURE)
    if kind != "closed_set":
        raise UsageError(f'MODEL.OVD.CLASSIFIER is {kind!r}: choose "text" or "closed_set".')
    if cfg.TEST.DISTRACTORS:
        raise UsageError("a closed-set head cannot be asked for TEST.DISTRACTORS: its classes are fixed.")
    return ClosedSetBranch(cfg.MODEL.DETR.DIM, len(vocabulary.vocabulary))
