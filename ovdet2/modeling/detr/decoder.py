"""The decoder: in each layer, queries attend to each other and to image points around their reference.

Shapes: B images, N queries, C channels, S tokens, H heads, L levels, P points.
Names: ``_deltas`` box regression relative to proposals or references,
``_cxcywh`` boxes (centre x, centre y, width, height).
"""

import torch
from torch import Tensor, nn

from ovdet2.layers.ms_deform_attn import MultiScaleDeformableAttention
from ovdet2.modeling.detr.encoder import FeedForward
from ovdet2.modeling.detr.heads import BoxHead, inverse_sigmoid
from ovdet2.modeling.detr.memory import Memory
from ovdet2.modeling.detr.outputs import Decoded


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the image, feed-forward block; norm after each."""

    def __init__(self, dim: int, heads: int, levels: int, points: int, ffn_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attn = MultiScaleDeformableAttention(dim, heads, levels, points)
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        nn.init.xavier_uniform_(self.self_attn.out_proj.weight)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Memory,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            content, position: Tensor [B, N, C].
            references: Tensor [B, N, L, 2 or 4] in [0, 1] of each level's map.
            memory: :class:`~ovdet2.modeling.detr.memory.Memory`.
            attention_mask: bool Tensor [N, N] or [B * H, N, N], True where the row's query must not see the column's.

        Returns:
            (content [B, N, C], sampling locations, sampling weights), the latter two as of
            :meth:`MultiScaleDeformableAttention.sample`.
        """
        placed = content + position
        attended, _ = self.self_attn(placed, placed, content, attn_mask=attention_mask, need_weights=False)
        content = self.self_norm(content + self.dropout(attended))
        shapes = memory.spatial_shapes
        locations, weights = self.cross_attn.sample(content + position, references, shapes)
        attended = self.cross_attn.attend(locations, weights, memory.tokens, shapes, memory.padding_mask)
        return self.ffn(self.cross_norm(content + self.dropout(attended))), locations, weights


class Decoder(nn.Module):
    """Decoder layers and their box heads."""

    def __init__(
        self,
        dim: int = 256,
        heads: int = 8,
        levels: int = 4,
        points: int = 4,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        layers: int = 6,
        refine: bool = True,
        look_forward_twice: bool = False,
        size_bias: float = -2.0,
    ) -> None:
        """
        Args:
            dim, heads, levels, points, ffn_dim, dropout: sizes of each layer; layers: number of layers.
            refine: the box predicted by a layer is the reference of the next one, and each layer has a separate box
                head; otherwise all layers share one head and the initial references.
            look_forward_twice: the loss of a layer's box also has a gradient to the layer before (DINO, Eq. 4).
            size_bias: initial width and height logit of the first head.
        """
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, levels, points, ffn_dim, dropout) for _ in range(layers))
        self.refine, self.look_forward_twice = refine, look_forward_twice
        biases = [size_bias] + [0.0] * (layers - 1) if refine else [size_bias]
        self.box_heads = nn.ModuleList(BoxHead(dim, bias) for bias in biases)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Memory,
        attention_mask: Tensor | None = None,
        keep_sampling: bool = False,
    ) -> Decoded:
        """
        Args:
            content, position: Tensor [B, N, C].
            references: Tensor [B, N, 2 or 4] in (0, 1) of the image without its padding.
            memory, attention_mask: as of :class:`DecoderLayer`.
            keep_sampling: also return the sampling locations and weights of the cross-attention.
        """
        hidden, boxes, used = [], [], []
        sampled: tuple[list[Tensor], list[Tensor]] = [], []
        previous = references
        for index, layer in enumerate(self.layers):
            ratios = memory.valid_ratios.repeat(1, 1, references.shape[-1] // 2)
            used.append(references)
            content, locations, weights = layer(
                content, position, references[:, :, None] * ratios[:, None], memory, attention_mask
            )
            deltas = self.box_heads[index if self.refine else 0](content)
            own = refine_boxes(references, deltas)  # its gradient stays in this layer
            hidden.append(content)
            boxes.append(refine_boxes(previous, deltas) if self.look_forward_twice else own)
            if self.refine:
                previous, references = own, own.detach()
            if keep_sampling:
                sampled[0].append(locations)
                sampled[1].append(weights)
        sampling = [torch.stack(part) for part in sampled] if keep_sampling else []
        return Decoded(torch.stack(hidden), torch.stack(boxes), tuple(used), *sampling)


def refine_boxes(references: Tensor, deltas: Tensor) -> Tensor:
    """Refine boxes: the logits of the result are those of the references plus predicted deltas.

    Args:
        references: Tensor [..., 4] of boxes, or [..., 2] of centres; then the deltas hold the logits of width and
            height.
        deltas: Tensor [..., 4].

    Returns:
        boxes_cxcywh: Tensor [..., 4] in (0, 1), of the references' dtype.
    """
    logits = inverse_sigmoid(references)
    deltas = deltas.to(logits.dtype)
    if references.shape[-1] == 2:
        return torch.cat([deltas[..., :2] + logits, deltas[..., 2:]], dim=-1).sigmoid()
    return (deltas + logits).sigmoid()
