"""Nearest neighbours and near-duplicate pairs of words in embedding space, without a K x K matrix in memory.

Shapes: K words, D embedding dimension.
"""

import torch

CELLS_AT_ONCE = 1 << 24  # cosines in memory at a time: 64 MiB


def nearest_words(embeddings: torch.Tensor, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest other words of some words.

    Args:
        embeddings: Tensor [K, D], unit rows.
        rows: Tensor [R] long, indices of the query words.
        count: neighbours of each; at most K - 1 are returned.

    Returns:
        (cosines [R, n], indices [R, n]), n = min(count, K - 1), nearest first.
    """
    count = min(count, len(embeddings) - 1)
    nearest = [torch.zeros(0, count)], [torch.zeros(0, count, dtype=torch.long)]
    for chunk in rows.split(_rows_at_once(embeddings)):
        cosines = embeddings[chunk] @ embeddings.T
        cosines.scatter_(1, chunk[:, None], -torch.inf)  # a word is not its own neighbour
        for parts, part in zip(nearest, cosines.topk(count, dim=1)):
            parts.append(part)
    return torch.cat(nearest[0]), torch.cat(nearest[1])


def close_pairs(
    embeddings: torch.Tensor, threshold: float = 0.98, limit: int = 20
) -> tuple[list[tuple[float, int, int]], int]:
    """Near-duplicate pairs: words whose embeddings a teacher can hardly distinguish.

    Args:
        embeddings: Tensor [K, D], unit rows.
        threshold: a pair is close if its cosine is above.
        limit: pairs listed.

    Returns:
        (pairs, total): the closest ``limit`` pairs as (cosine, i, j) with i < j, closest first; and the number of pairs
        above the threshold.
    """
    total, pairs = 0, []
    for rows in torch.arange(len(embeddings)).split(_rows_at_once(embeddings)):
        start = int(rows[0])  # pairs with earlier words are done already
        cosines = (embeddings[rows] @ embeddings[start:].T).triu_(diagonal=1)  # the pairs with j > i
        cosines.masked_fill_(~(cosines > threshold), -torch.inf)
        close = int(cosines.isfinite().sum())
        total += close
        values, cells = cosines.flatten().topk(min(limit, close))
        i, j = cells // cosines.shape[1] + start, cells % cosines.shape[1] + start
        pairs = sorted(pairs + list(zip(values.tolist(), i.tolist(), j.tolist())), key=lambda p: (-p[0], *p[1:]))
        pairs = pairs[:limit]
    return pairs, total


def _rows_at_once(embeddings):
    return max(1, CELLS_AT_ONCE // max(1, len(embeddings)))
