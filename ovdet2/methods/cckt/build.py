"""Build the part of CCKT-Det from MODEL.CCKT.*."""

from __future__ import annotations

from functools import partial

from detectron2.config import CfgNode

from ovdet2.methods.cckt.online_priors import OnlinePriors
from ovdet2.methods.cckt.part import CCKT
from ovdet2.methods.cckt.semantic_priors import SemanticPriors
from ovdet2.modeling.host import Host


def build_cckt(cfg: CfgNode, host: Host) -> CCKT:
    """Build the part of MODEL.CCKT.

    Args:
        cfg: configuration.
        host: DETR host; the class branches of its network are frozen if no loss trains them.

    Raises:
        UsageError: see :class:`CCKT` and :class:`SemanticPriors`.
    """
    settings, detr = cfg.MODEL.CCKT, cfg.MODEL.DETR
    network = host.network
    assert network is not None  # CCKT is of the DETR host only
    two_stage = detr.VARIANT in ("two_stage", "plus_plus")
    assignment = settings.ASSIGNMENT or ("interleave" if two_stage else "blocks")
    part = CCKT(
        host.bank,
        SemanticPriors(host.bank, detr.DIM, assignment, settings.PRIOR_GAIN) if settings.PRIORS else None,
        detr.DIM,
        network.transformer.num_branches,
        temperature=settings.TEMPERATURE,
        # Features of norm n are the unit ones at a temperature divided by n.
        contrast_temperature=(settings.CONTRAST_TEMPERATURE or settings.TEMPERATURE) / settings.CONTRAST_NORM,
        bias=settings.SIMILARITY_BIAS,
        similarity_cost=settings.SIMILARITY_COST,
        class_loss=settings.CLASS_LOSS_ON,
        contrast=settings.CONTRAST,
        contrast_start=settings.CONTRAST_START,
        score=settings.SCORE,
        alpha=detr.FOCAL_ALPHA,
        gamma=detr.FOCAL_GAMMA,
        look=partial(
            OnlinePriors,
            threshold=settings.PRIOR_THRESHOLD,
            top=settings.PRIOR_TOP,
            fill=settings.PRIOR_FILL,
            tiles=settings.PRIOR_TILES,
            seed=max(cfg.SEED, 0),
        ),
        # The focal loss on similarities has the same weight as the class loss.
        loss_weights={"loss_similarity": detr.CLASS_WEIGHT, "loss_contrast": settings.CONTRAST_WEIGHT},
    )
    if settings.CLASS_LOSS_ON == "similarity":
        network.class_branches.requires_grad_(False)
    return part
