"""The encoder: every token attends to points around its position on all levels.

Shapes: B images, S tokens, C channels, L levels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ovdet2.layers.ms_deform_attn import MultiScaleDeformableAttention


class FeedForward(nn.Module):
    """Two linear layers with a ReLU, a residual connection and layer norm."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tensor [..., C] -> [..., C]."""
        hidden = self.dropout(self.linear1(tokens).relu_())  # in place: its gradient needs only the result
        return self.norm(tokens + self.dropout(self.linear2(hidden)))


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward block, norm after each."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(dim, heads, levels, points)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        references: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor,
    ) -> Tensor:
        """Arguments as of :class:`Encoder`, references [B, S, L, 2]; returns Tensor [B, S, C]."""
        attended = self.self_attn(tokens + position, references, tokens, spatial_shapes, padding_mask)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class Encoder(nn.Module):
    """A stack of :class:`EncoderLayer`."""

    def __init__(
        self,
        dim: int = 256,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        layers: int = 6,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(dim, heads, levels, points, ffn_dim, dropout) for _ in range(layers))

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor,
        valid_ratios: Tensor,
    ) -> Tensor:
        """
        Args:
            tokens, position: Tensor [B, S, C].
            spatial_shapes: L (height, width).
            padding_mask: bool Tensor [B, S], True where padded.
            valid_ratios: Tensor [B, L, 2], (x, y): the part of each map that is not padding.

        Returns:
            Tensor [B, S, C].
        """
        references = cell_centres(spatial_shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]
        for layer in self.layers:
            tokens = layer(tokens, position, references, spatial_shapes, padding_mask)
        return tokens


def cell_centres(spatial_shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Centres of all cells, in units of the valid part of their map.

    Args:
        spatial_shapes, valid_ratios: as of :class:`Encoder`.

    Returns:
        Tensor [B, S, 2], (x, y), in (0, 1) for cells that are not padding.
    """
    centres = []
    for level, (height, width) in enumerate(spatial_shapes):
        y = torch.arange(height, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5
        x = torch.arange(width, dtype=valid_ratios.dtype, device=valid_ratios.device) + 0.5
        y, x = torch.meshgrid(y / height, x / width, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).flatten(0, 1) / valid_ratios[:, None, level])
    return torch.cat(centres, dim=1)
