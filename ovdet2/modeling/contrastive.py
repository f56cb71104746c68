"""Contrastive loss over a batch, which may be distributed over several processes.

Shapes: M pairs, D embedding dimension.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F


def symmetric_info_nce(logits: Tensor, ignored: Tensor | None = None) -> Tensor:
    """Cross-entropy of M pairs in both directions, averaged (InfoNCE; CLIP, Radford et al., 2021, Fig. 3).

    Args:
        logits: Tensor [M, M], scaled similarities of one side (rows) and the other; positive pairs are the diagonal.
        ignored: Tensor [M, M] bool, True where an off-diagonal entry is not a negative, such as two equal captions; the
            diagonal is never ignored. None: every off-diagonal entry is a negative.

    Returns:
        A scalar, float32 (float64 if ``logits`` is); 0 with one pair or none.

    Raises:
        ValueError: the logits are not square.
    """
    if logits.dim() != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"the logits must be a square matrix, not {list(logits.shape)}")
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    if not len(logits):
        return logits.sum()
    if ignored is not None:
        own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(ignored & ~own, -torch.inf)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """All-gather rows of all processes, with gradients; a collective call.

    If every process computes the same loss over the gathered rows, the gradients averaged by DistributedDataParallel
    equal those of one process with the full batch. Every process must make this call in every step, before any code
    that may raise in one process only. Its rows must require a gradient even if there are none (M = 0).

    Args:
        rows: Tensor [M, ...] of this process; M may differ between processes.

    Returns:
        (Tensor [sum of M, ...], index of this process's first row). With one process: (``rows``, 0).
    """
    if comm.get_world_size() == 1:
        return rows, 0
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(comm.get_world_size())]
    dist.all_gather(counts, count)
    counts = [int(number) for number in counts]
    return _Gather.apply(rows, counts), sum(counts[: comm.get_rank()])


class _Gather(torch.autograd.Function):
    """All-gather of unequal numbers of rows; the backward pass sums the gradients of all processes."""

    @staticmethod
    def forward(ctx, rows, counts):
        ctx.counts = counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts)])

    @staticmethod
    def backward(ctx, *gradients):
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[comm.get_rank()], None
