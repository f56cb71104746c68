"""Deformable DETR's transformer in three steps, so that methods can act between the steps.

Shapes: B images, S tokens of L levels, N queries, C channels, H heads, P points, Ld decoder layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.decoder import Decoder
from ovdet2.modeling.detr.encoder import Encoder
from ovdet2.modeling.detr.memory import Memory, Queries
from ovdet2.modeling.detr.outputs import Decoded
from ovdet2.modeling.detr.position_encoding import sine_position, valid_size
from ovdet2.modeling.detr.queries import LearnedQueries, ProposalQueries

VARIANTS = ("one_stage", "refine", "two_stage", "plus_plus")


class DeformableTransformer(nn.Module):
    """Encoder, query selection and decoder.

    ``decode(memory, queries(memory))`` after ``memory = encode(...)`` is the published model. Semantic priors add to
    ``queries.content``; denoising appends queries and passes an attention mask.
    """

    def __init__(
        self,
        variant: str = "refine",
        dim: int = 256,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        num_queries: int = 300,
        wide_position: bool = False,
    ) -> None:
        """
        Args:
            variant: "one_stage"; "refine": each layer refines the boxes of the one before; "two_stage": also, queries
                are the encoder's proposals; "plus_plus": two-stage with mixed query selection and look forward twice
                (its published setting has ``dropout`` 0).
            dim, heads, levels, points, ffn_dim: C, H, L, P and the width of the feed-forward blocks.
            dropout: in the attention of queries, after attention, and in the feed-forward blocks.
            encoder_layers, decoder_layers, num_queries: numbers of layers and queries; the latter two are Ld and N.
            wide_position: of "plus_plus", see :class:`~ovdet2.modeling.detr.queries.ProposalQueries`.

        Raises:
            UsageError: the variant is unknown, C is not a multiple of 4, or ``wide_position`` is set for a variant other
                than "plus_plus".
        """
        super().__init__()
        if variant not in VARIANTS:
            raise UsageError(f"unknown variant {variant!r} of Deformable DETR: choose one of {', '.join(VARIANTS)}.")
        if dim % 4:
            raise UsageError(f"positions need a multiple of 4 channels, not {dim}.")
        if wide_position and variant != "plus_plus":
            raise UsageError(f"MODEL.DETR.WIDE_POSITION is a setting of plus_plus: set it to False for {variant}.")
        two_stage = variant in ("two_stage", "plus_plus")
        self.heads = heads
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        self.encoder = Encoder(dim, heads, levels, points, ffn_dim, dropout, encoder_layers)
        if two_stage:
            self.query_maker = ProposalQueries(dim, num_queries, variant == "plus_plus", wide_position)
        else:
            self.query_maker = LearnedQueries(dim, num_queries)
        self.decoder = Decoder(
            dim,
            heads,
            levels,
            points,
            ffn_dim,
            dropout,
            decoder_layers,
            refine=variant != "one_stage",
            look_forward_twice=variant == "plus_plus",
            size_bias=0.0 if two_stage else -2.0,  # proposals already have a size
        )

    @property
    def num_branches(self) -> int:
        """Number of prediction heads: one per decoder layer, or one for all if layers do not refine boxes."""
        return len(self.decoder.box_heads)

    def encode(self, features: Sequence[Tensor], masks: Sequence[Tensor]) -> Memory:
        """
        Args:
            features: list of L Tensor [B, C, h, w].
            masks: list of L bool Tensor [B, h, w], True where padded; the rest is a rectangle at the upper left.
        """
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        shapes = tuple((feature.shape[-2], feature.shape[-1]) for feature in features)
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        dim = tokens.shape[-1]
        position = [
            (sine_position(mask, dim, dtype) + embed).flatten(1, 2) for mask, embed in zip(masks, self.level_embed)
        ]
        ratios = torch.stack([_valid_ratio(mask, dtype) for mask in masks], dim=1)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        tokens = self.encoder(tokens, torch.cat(position, dim=1), shapes, padding, ratios)
        return Memory(tokens, shapes, padding, ratios)

    def queries(self, memory: Memory) -> Queries:
        """The input queries of the decoder."""
        return self.query_maker(memory)

    def decode(
        self, memory: Memory, queries: Queries, attention_mask: Tensor | None = None, keep_sampling: bool = False
    ) -> Decoded:
        """
        Args:
            memory: result of :meth:`encode`.
            queries: any number of queries.
            attention_mask: bool Tensor [N, N] or [B * H, N, N], True where the row's query must not see the column's.
            keep_sampling: also return the sampling locations and weights of the cross-attention.

        Raises:
            UsageError: the queries have no position, and it cannot be encoded from their references.
        """
        position = queries.position
        if position is None:
            position = self.query_maker.encode_position(queries.references)
        return self.decoder(queries.content, position, queries.references, memory, attention_mask, keep_sampling)


def _valid_ratio(mask, dtype):
    """The part of a map that is not padding, along x and y: bool Tensor [B, h, w] -> [B, 2]."""
    height, width = valid_size(mask)
    return torch.stack([width.to(dtype) / mask.shape[2], height.to(dtype) / mask.shape[1]], dim=-1)
