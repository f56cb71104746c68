"""Losses as pure functions, one per equation; weights belong to the configuration.

Shapes: R regions, D embedding dimension, B base words.
"""

import torch
from torch.nn import functional as F


def embedding_l1(student, teacher):
    """Distance of region embeddings, summed over dimensions and averaged over regions (ViLD Eq. 3).

    With the sum over D the weight w is the paper's number; implementations that average over D as well write ViLD's
    w = 0.5 at D = 512 as 256. At one angle between the embeddings the distance grows with the square root of D.

    Args:
        student: Tensor [R, D], unit rows.
        teacher: Tensor [R, D], unit rows of any floating type; the target.

    Returns:
        Scalar Tensor, float32 (float64 if ``student`` is): mean_R sum_D |e - v|, between 0 and 2 sqrt(D); 0 without
        regions.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student embeddings {list(student.shape)}, teacher embeddings {list(teacher.shape)}")
    if student.dtype.itemsize < 4:
        student = student.float()
    distances = (student - teacher.to(student)).abs().sum(dim=1)
    return distances.mean() if len(distances) else distances.sum()


def background_weighted_cross_entropy(logits, labels, weight):
    """Softmax cross-entropy of regions, those of background weighted, averaged over the number of regions (F-VLM).

    Args:
        logits: Tensor [R, B + 1], background last.
        labels: Tensor [R] int64: 0..B-1, or B for background.
        weight: of a region of background, 0 or more.

    Returns:
        Scalar Tensor, float32 (float64 if ``logits`` is); 0 without regions.
    """
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    losses = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.where(labels == logits.shape[1] - 1, float(weight), 1.0)
    return (losses * weights.to(losses)).sum() / max(len(labels), 1)


def sigmoid_classification(logits, labels, words=None):
    """Binary cross-entropy of every region and word, summed over words and averaged over regions.

    With ``words`` it is the federated loss (Zhou et al., Probabilistic two-stage detection, 2021): the others are not
    known to be absent.

    Args:
        logits: Tensor [R, B].
        labels: Tensor [R] int64: 0..B-1, or B for background.
        words: Tensor [B] bool, those that take part; None: all.

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


def federated_words(labels, weights, count):
    """The words of a federated loss: those annotated in the batch, filled up to ``count`` by a weighted draw.

    Args:
        labels: Tensor [R] int64: 0..B-1, or B for background.
        weights: Tensor [B], not negative; a word of weight 0 is never drawn. Drawn from torch's global generator.
        count: words wanted; more take part if the batch has more.

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
