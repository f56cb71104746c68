"""Deformable DETR's transformer in three steps, so that methods can get in between.

Shapes: B images, S tokens of L levels, N queries, C channels, H heads, P points, Ld decoder layers.
"""

import torch
from torch import nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.decoder import Decoder
from ovdet2.modeling.detr.encoder import Encoder
from ovdet2.modeling.detr.memory import Memory
from ovdet2.modeling.detr.position_encoding import sine_position, valid_size
from ovdet2.modeling.detr.queries import LearnedQueries, ProposalQueries

VARIANTS = ("one_stage", "refine", "two_stage", "plus_plus")


class DeformableTransformer(nn.Module):
    """Encoder, query maker and decoder.

    ``decode(memory, queries(memory))`` after ``memory = encode(...)`` is the published model. Semantic priors add to
    ``queries.content``; denoising appends queries and passes an attention mask.
    """

    def __init__(
        self,
        variant="refine",
        dim=256,
        heads=8,
        levels=4,
        points=4,
        ffn_dim=1024,
        dropout=0.1,
        encoder_layers=6,
        decoder_layers=6,
        num_queries=300,
    ):
        """
        Args:
            variant: "one_stage"; "refine", each layer refines the boxes of the one before; "two_stage", which also
                starts from the encoder's proposals; "plus_plus", two-stage with mixed query selection and look forward
                twice (its published setting has ``dropout`` 0).
            dim, heads, levels, points, ffn_dim: C, H, L, P and the width of the feed-forward blocks.
            dropout: in the attention of queries, after attention, and in the feed-forward blocks.
            encoder_layers, decoder_layers, num_queries: numbers, the latter two Ld and N.

        Raises:
            UsageError: unknown variant, or C is not a multiple of 4.
        """
        super().__init__()
        if variant not in VARIANTS:
            raise UsageError(f"unknown variant {variant!r} of Deformable DETR: choose one of {', '.join(VARIANTS)}.")
        if dim % 4:
            raise UsageError(f"positions need a multiple of 4 channels, not {dim}.")
        two_stage = variant in ("two_stage", "plus_plus")
        self.heads = heads
        self.level_embed = nn.Parameter(torch.randn(levels, dim))
        self.encoder = Encoder(dim, heads, levels, points, ffn_dim, dropout, encoder_layers)
        if two_stage:
            self.query_maker = ProposalQueries(dim, num_queries, mixed=variant == "plus_plus")
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
            size_bias=0.0 if two_stage else -2.0,  # proposals come with a size
        )

    @property
    def num_branches(self):
        """Prediction heads wanted: one per decoder layer, or one for all where layers do not refine."""
        return len(self.decoder.box_heads)

    def encode(self, features, masks):
        """
        Args:
            features: list of L Tensor [B, C, h, w].
            masks: list of L bool Tensor [B, h, w], True where padded; the rest is a rectangle at the upper left.

        Returns:
            :class:`Memory`.
        """
        dtype = torch.promote_types(features[0].dtype, torch.float32)
        shapes = tuple(tuple(feature.shape[-2:]) for feature in features)
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        dim = tokens.shape[-1]
        position = [
            (sine_position(mask, dim, dtype) + embed).flatten(1, 2) for mask, embed in zip(masks, self.level_embed)
        ]
        ratios = torch.stack([_valid_ratio(mask, dtype) for mask in masks], dim=1)
        padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        tokens = self.encoder(tokens, torch.cat(position, dim=1), shapes, padding, ratios)
        return Memory(tokens, shapes, padding, ratios)

    def queries(self, memory):
        """The :class:`~ovdet2.modeling.detr.memory.Queries` for a :class:`Memory`."""
        return self.query_maker(memory)

    def decode(self, memory, queries, attention_mask=None, keep_sampling=False):
        """
        Args:
            memory: :class:`Memory`.
            queries: :class:`~ovdet2.modeling.detr.memory.Queries`, of any number.
            attention_mask: bool Tensor [N, N] or [B * H, N, N], True where the row's query must not see the column's.
            keep_sampling: return where and how strongly each query looked.

        Returns:
            dict of
            "hidden": Tensor [Ld, B, N, C];
            "boxes_cxcywh": Tensor [Ld, B, N, 4] in (0, 1) of the image without its padding;
            "references": list of Ld Tensor [B, N, 2 or 4], what each layer started from, in the same frame;
            with ``keep_sampling`` "sampling_locations", Tensor [Ld, B, N, H, L, P, 2], (x, y) in [0, 1] of the padded
            map of each level, and "sampling_weights", Tensor [Ld, B, N, H, L, P].

        Raises:
            UsageError: the queries' position is missing and cannot be encoded from their references.
        """
        position = queries.position
        if position is None:
            position = self.query_maker.encode_position(queries.references)
        return self.decoder(queries.content, position, queries.references, memory, attention_mask, keep_sampling)


def _valid_ratio(mask, dtype):
    """The part of a map that is not padding, along x and y: bool Tensor [B, h, w] -> [B, 2]."""
    height, width = valid_size(mask)
    return torch.stack([width.to(dtype) / mask.shape[2], height.to(dtype) / mask.shape[1]], dim=-1)
