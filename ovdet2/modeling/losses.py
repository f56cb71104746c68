"""Losses as pure functions, one per equation; loss weights are applied elsewhere.

Shapes: R regions, B base words.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def background_weighted_cross_entropy(logits: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Softmax cross-entropy with a weight on background regions, averaged over all regions (F-VLM).

    Args:
        logits: Tensor [R, B + 1], background last.
        labels: Tensor [R] int64: 0..B-1, or B for background.
        weight: weight of a background region, 0 or more.

    Returns:
        Scalar Tensor, float32 (float64 if ``logits`` is); 0 without regions.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.where(labels == logits.shape[1] - 1, float(weight), 1.0)
    return (losses * weights.to(losses)).sum() / max(len(labels), 1)


def sigmoid_classification(logits: Tensor, labels: Tensor, words: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every region and word, summed over words and averaged over regions.

    With ``words`` it is the federated loss (Zhou et al., Probabilistic two-stage detection, 2021): other words may be
    present without annotation.

    Args:
        logits: Tensor [R, B].
        labels: Tensor [R] int64: 0..B-1, or B for background.
        words: Tensor [B] bool, words included in the loss; None: all.

    Returns:
        Scalar Tensor, float32 (float64 if ``logits`` is); 0 without regions.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    targets = F.one_hot(labels, logits.shape[1] + 1)[:, :-1].to(logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if words is not None:
        losses = losses * words.to(losses)
    return losses.sum() / max(len(labels), 1)


def federated_words(labels: Tensor, weights: Tensor, count: int) -> Tensor:
    """The words of a federated loss: those annotated in the batch, and randomly drawn ones up to ``count``.

    Args:
        labels: Tensor [R] int64: 0..B-1, or B for background.
        weights: Tensor [B] >= 0, proportional to the probability of a draw from torch's global generator.
        count: number of words; more are returned if the batch has more.

    Returns:
        Tensor [B] bool.
    """
    present = F.one_hot(labels, len(weights) + 1).any(dim=0)[:-1] if len(labels) else torch.zeros_like(weights).bool()
    chances = weights.float().masked_fill(present, 0.0)
    missing = min(count - int(present.sum()), int((chances > 0).sum()))
    if missing > 0:
        present = present.clone()
        present[torch.multinomial(chances, missing)] = True
    return present
