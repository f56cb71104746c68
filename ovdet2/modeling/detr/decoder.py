"""The decoder: queries attend to each other and to points of the image around their reference, layer after layer.

Shapes: B images, N queries, C channels, S tokens, H heads, L levels, P points.
"""

import torch
from torch import nn

from ovdet2.layers.ms_deform_attn import MultiScaleDeformableAttention
from ovdet2.modeling.detr.encoder import FeedForward
from ovdet2.modeling.detr.heads import BoxHead, inverse_sigmoid


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the image, feed-forward block; norm after each."""

    def __init__(self, dim, heads, levels, points, ffn_dim, dropout):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(dim)
        self.cross_attn = MultiScaleDeformableAttention(dim, heads, levels, points)
        self.cross_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.ffn = FeedForward(dim, ffn_dim, dropout)
        nn.init.xavier_uniform_(self.self_attn.out_proj.weight)

    def forward(self, content, position, references, memory, attention_mask=None):
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
        dim=256,
        heads=8,
        levels=4,
        points=4,
        ffn_dim=1024,
        dropout=0.1,
        layers=6,
        refine=True,
        look_forward_twice=False,
        size_bias=-2.0,
    ):
        """
        Args:
            dim, heads, levels, points, ffn_dim, dropout, layers: sizes of the layers.
            refine: each layer's box is the next one's reference, and each layer has a box head of its own; otherwise
                all layers share one head and the first references.
            look_forward_twice: the gradient of a layer's box passes through the layer before, too (DINO, Eq. 4).
            size_bias: initial width and height logit of the first head.
        """
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, levels, points, ffn_dim, dropout) for _ in range(layers))
        self.refine, self.look_forward_twice = refine, look_forward_twice
        biases = [size_bias] + [0.0] * (layers - 1) if refine else [size_bias]
        self.box_heads = nn.ModuleList(BoxHead(dim, bias) for bias in biases)

    def forward(self, content, position, references, memory, attention_mask=None, keep_sampling=False):
        """
        Args:
            content, position: Tensor [B, N, C].
            references: Tensor [B, N, 2 or 4] in (0, 1) of the image without its padding.
            memory, attention_mask: as of :class:`DecoderLayer`.
            keep_sampling: return where and how strongly each query looked.

        Returns:
            dict, see :meth:`~ovdet2.modeling.detr.transformer.DeformableTransformer.decode`.
        """
        hidden, boxes, used, sampled = [], [], [], []
        previous = references
        for index, layer in enumerate(self.layers):
            ratios = memory.valid_ratios.repeat(1, 1, references.shape[-1] // 2)
            used.append(references)
            content, *sampling = layer(
                content, position, references[:, :, None] * ratios[:, None], memory, attention_mask
            )
            change = self.box_heads[index if self.refine else 0](content)
            own = update(references, change)  # whose gradient stays in this layer
            hidden.append(content)
            boxes.append(update(previous, change) if self.look_forward_twice else own)
            if self.refine:
                previous, references = own, own.detach()
            if keep_sampling:
                sampled.append(sampling)
        output = {"hidden": torch.stack(hidden), "boxes_cxcywh": torch.stack(boxes), "references": used}
        if keep_sampling:
            output["sampling_locations"], output["sampling_weights"] = (torch.stack(parts) for parts in zip(*sampled))
        return output


def update(references, change):
    """Boxes whose logits are those of the references plus a predicted change.

    Args:
        references: Tensor [..., 2] of centres, whose boxes' width and height are predicted outright, or [..., 4].
        change: Tensor [..., 4].

    Returns:
        boxes_cxcywh: Tensor [..., 4] in (0, 1), of the references' dtype.
    """
    logits = inverse_sigmoid(references)
    change = change.to(logits.dtype)
    if references.shape[-1] == 2:
        return torch.cat([change[..., :2] + logits, change[..., 2:]], dim=-1).sigmoid()
    return (change + logits).sigmoid()
