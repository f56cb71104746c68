"""Decode extra queries of parts (denoising) together with the detector's queries, which do not attend to them.

Shapes: B images, N queries of the detector, G extra queries of a part, T all of them, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ovdet2.modeling.detr.memory import Queries
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.part import DetrPart, DetrStep, ExtraQueries
from ovdet2.modeling.detr.transformer import DeformableTransformer


def decode_with(
    step: DetrStep, extra: Sequence[ExtraQueries | None], parts: Sequence[DetrPart]
) -> tuple[DetrOutputs, list[DetrOutputs | None]]:
    """Decode the detector's queries and the extra queries of parts in one pass.

    Args:
        step: training step before decoding.
        extra: extra queries of each part, None for a part without.
        parts: parts of the detector, which may alter the outputs of all queries.

    Returns:
        (outputs of the detector's queries, outputs of each part's extra queries), with the logits of every layer. The
        encoder's outputs are in the first.
    """
    network, queries, mask = step.network, step.queries, None
    given = [group for group in extra if group is not None]
    if given:
        queries = joined_queries(queries, given, network.transformer)
        mask = attention_mask(step.queries.content.shape[1], [group.hidden for group in given])
    outputs = network.decode(step.memory, queries, attention_mask=mask, all_layers=True)
    for part in parts:
        outputs = part.alter_outputs(outputs)
    if not given:
        return outputs, [None] * len(extra)
    start = step.queries.content.shape[1]
    own, others = outputs.take(slice(start)), []
    for group in extra:
        if group is None:
            others.append(None)
            continue
        end = start + group.queries.content.shape[1]
        others.append(replace(outputs.take(slice(start, end)), encoder=None))
        start = end
    return own, others


def joined_queries(queries: Queries, extra: Sequence[ExtraQueries], transformer: DeformableTransformer) -> Queries:
    """The detector's queries followed by those of each group. Missing positions are encoded from the references.

    Attachments are dropped, since they describe the detector's queries only.
    """
    groups = [queries, *(group.queries for group in extra)]
    encode = transformer.query_maker.encode_position
    positions = [encode(group.references) if group.position is None else group.position for group in groups]
    return replace(
        queries,
        content=torch.cat([group.content.to(queries.content) for group in groups], dim=1),
        position=torch.cat([position.to(positions[0]) for position in positions], dim=1),
        references=torch.cat([group.references for group in groups], dim=1),
        attachments={},
    )


def attention_mask(conventional: int, hidden: Sequence[Tensor]) -> Tensor:
    """Self-attention mask. The detector's queries attend to each other; a group attends to them and to part of itself.

    Args:
        conventional: N.
        hidden: of each group, Tensor [B * H, G, N + G] bool, see :class:`ExtraQueries`.

    Returns:
        Tensor [B * H, T, T] bool, True where the column is hidden from the row.
    """
    total = conventional + sum(group.shape[1] for group in hidden)
    mask = hidden[0].new_ones(len(hidden[0]), total, total)
    mask[:, :conventional, :conventional] = False
    start = conventional
    for group in hidden:
        end = start + group.shape[1]
        mask[:, start:end, :conventional] = group[:, :, :conventional]
        mask[:, start:end, start:end] = group[:, :, conventional:]
        start = end
    return mask
