"""Losses between regions and words or captions, as pure functions, one per equation; weights are applied elsewhere.

With z a logit, ``bce(z, 1) = softplus(-z)`` and ``bce(z, 0) = softplus(z)``.

Shapes: R regions, K concepts, T captions, W nouns, M groups, P regions of a group, D embedding dimension.
Names: ``_logits`` before softmax or sigmoid.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ovdet2.layers import cosine_logits


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


def tag_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Detic's loss of image tags (Zhou et al., 2022): for each tag t of a region ``sum_k bce(z_k, [k = t])``, averaged
    over the tags, then over the regions that have a tag.

    Every concept that is no tag is a negative; with several tags, so is each for the others.

    Args:
        logits: Tensor [R, K].
        targets: Tensor [R, K] bool, the tags.

    Returns:
        Scalar, float32 (float64 if ``logits`` is); 0 if no region has a tag.
    """
    logits = _wide(logits)
    chosen = targets.any(dim=1)
    logits, targets = logits[chosen], targets[chosen].to(logits)
    positives = (logits * targets).sum(dim=1) / targets.sum(dim=1)
    return (F.softplus(logits).sum(dim=1) - positives).sum() / max(len(logits), 1)


def caption_bce(logits: Tensor, positive: Tensor, negative_weight: float | Tensor = 1.0) -> Tensor:
    """Loss of captions: ``mean_positives bce(z, 1) + sum_negatives w bce(z, 0)``, averaged over the regions (Detic, CLIM).

    Args:
        logits: Tensor [R, T].
        positive: Tensor [R, T] bool: whether the caption is of an image of the region; all others are negatives.
        negative_weight: w, a number or Tensor [R, T].

    Returns:
        Scalar, float32 (float64 if ``logits`` is); 0 without regions.
    """
    logits = _wide(logits)
    matched = (F.softplus(-logits) * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    other = (negative_weight * F.softplus(logits) * ~positive).sum(dim=1)
    return (matched + other).sum() / max(len(logits), 1)


def hungarian_bce(own_logits: Tensor, other_logits: Tensor) -> Tensor:
    """VLDet's loss of one image (Lin et al., ICLR 2023): its nouns are assigned to its regions one to one, so that the
    sum of logits is highest. A pair of region and noun adds ``bce(z, 1)`` and ``bce(z, 0)`` of all other images' nouns.

    Args:
        own_logits: Tensor [R, W] of the image's nouns; min(R, W) pairs are made.
        other_logits: Tensor [R, W'] of nouns of other images that are not nouns of this image.

    Returns:
        Scalar sum over the pairs, float32 (float64 if the logits are); 0 without pairs.
    """
    own_logits, other_logits = _wide(own_logits), _wide(other_logits)
    rows, columns = linear_sum_assignment(own_logits.detach().cpu().double().numpy(), maximize=True)
    rows, columns = (torch.as_tensor(of, device=own_logits.device) for of in (rows, columns))
    return F.softplus(-own_logits[rows, columns]).sum() + F.softplus(other_logits[rows]).sum()


def prototypes(features: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the regions of each group, unit rows (CoDet): Tensor [M, P, D], Tensor [M, P] -> [M, D]."""
    return F.normalize((weights[..., None] * features).sum(dim=1), dim=1)


def prototype_bce(
    features: Tensor,
    weights: Tensor,
    table: Tensor,
    concepts: Tensor,
    temperature: float | Tensor,
    columns: Tensor | None = None,
) -> Tensor:
    """CoDet's loss (Ma et al., NeurIPS 2023): ``sum_k bce(cos(prototype, t_k) / tau, [k = concept])``, averaged over groups.

    Args:
        features: Tensor [M, P, D] of the regions of each group, not normalised; rows of zeros are padding.
        weights: Tensor [M, P], rows that sum to 1: a softmax over the regions.
        table: Tensor [K, D], unit rows.
        concepts: Tensor [M] int64, the concept of each group.
        temperature: tau.
        columns: Tensor [M, K] bool, concepts in the sum; the group's concept is always included. None: all.

    Returns:
        Scalar; 0 without groups.
    """
    logits = cosine_logits(prototypes(features, weights), table, temperature=temperature)
    targets = F.one_hot(concepts, len(table)).bool()
    losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="none")
    if columns is not None:
        losses = losses * (columns | targets)
    return losses.sum() / max(len(losses), 1)


def info_nce(logits: Tensor, positive: Tensor, ignored: Tensor | None = None) -> Tensor:
    """InfoNCE with several positives, ``-mean_positives log softmax(z)``, averaged over the rows with a positive.

    For both directions (BARON) add the loss of the transposed arguments. For pairs of one batch see
    :func:`~ovdet2.modeling.contrastive.symmetric_info_nce`.

    Args:
        logits: Tensor [R, T], scaled similarities.
        positive: Tensor [R, T] bool.
        ignored: Tensor [R, T] bool: neither positive nor negative, as other captions of one image; positives stay.

    Returns:
        Scalar, float32 (float64 if ``logits`` is); 0 if no row has a positive.
    """
    logits = _wide(logits)
    if ignored is not None:
        logits = logits.masked_fill(ignored & ~positive, -torch.inf)
    chosen = positive.any(dim=1)
    logits, positive = logits[chosen], positive[chosen]
    logs = logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
    return -(logs.sum(dim=1) / positive.sum(dim=1)).sum() / max(len(logits), 1)
