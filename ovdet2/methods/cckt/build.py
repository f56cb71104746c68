"""From MODEL.CCKT.* to what it adds to the detector."""

from ovdet2.methods.cckt.part import CCKT
from ovdet2.methods.cckt.semantic_priors import SemanticPriors


def build_cckt(cfg, network, vocabulary):
    """What MODEL.CCKT adds, and its matching costs.

    Args:
        cfg: configuration.
        network: :class:`~ovdet2.modeling.detr.model.DeformableDETR`; its class branches are frozen where no loss would
            train them.
        vocabulary: :class:`~ovdet2.layers.WordBank` of the detector.

    Returns:
        (:class:`CCKT` or None, list of (weight, function) as :class:`HungarianMatcher` takes them).

    Raises:
        UsageError: see :class:`CCKT` and :class:`SemanticPriors`.
    """
    settings, detr = cfg.MODEL.CCKT, cfg.MODEL.DETR
    if not settings.ENABLED:
        return None, []
    two_stage = detr.VARIANT in ("two_stage", "plus_plus")
    assignment = settings.ASSIGNMENT or ("interleave" if two_stage else "blocks")
    cckt = CCKT(
        vocabulary,
        SemanticPriors(vocabulary, detr.DIM, assignment, settings.PRIOR_GAIN) if settings.PRIORS else None,
        detr.DIM,
        network.transformer.num_branches,
        temperature=settings.TEMPERATURE,
        bias=settings.SIMILARITY_BIAS,
        class_loss=settings.CLASS_LOSS_ON,
        contrast=settings.CONTRAST,
        contrast_start=settings.CONTRAST_START,
        score=settings.SCORE,
        alpha=detr.FOCAL_ALPHA,
        gamma=detr.FOCAL_GAMMA,
    )
    if settings.CLASS_LOSS_ON == "similarity":
        network.class_branches.requires_grad_(False)
    return cckt, [(settings.SIMILARITY_COST, cckt.similarity_cost)] if cckt.heads else []


def cckt_weights(cfg):
    """Weights by kind of loss: the focal loss on similarities has that of the class loss."""
    return {"loss_similarity": cfg.MODEL.DETR.CLASS_WEIGHT, "loss_contrast": cfg.MODEL.CCKT.CONTRAST_WEIGHT}
