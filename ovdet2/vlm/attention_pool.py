"""CLIP's attention pooling over regions of a feature map: F-VLM's region embedding.

Shapes: N images, R regions, C channels, h x w feature map, g side of the pool's native grid, T = g * g + 1 tokens,
A attention heads, D embedding dimension.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

if TYPE_CHECKING:
    from open_clip.modified_resnet import AttentionPool2d


def attention_pool(pool: "AttentionPool2d", maps: torch.Tensor) -> torch.Tensor:
    """Equal to ``pool(maps)`` for maps of the native grid, at a fraction of its cost.

    CLIP reads only the output of the mean token, so there is one query q per map, and the projections commute with
    the sum over tokens x: the logits are (W_k^T q) x + q b_k and the output is W_v (sum of a x) + b_v, where a is
    their softmax. Therefore tokens are not projected.

    Args:
        pool: open_clip's AttentionPool2d.
        maps: Tensor [R, C, g, g], in the pool's dtype.

    Returns:
        Tensor [R, D], not normalised.
    """
    heads, channels = pool.num_heads, maps.shape[1]
    tokens = maps.flatten(2)  # [R, C, g * g]
    tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2)  # [R, C, T]
    tokens = tokens + pool.positional_embedding.T.to(tokens.dtype)
    queries = pool.q_proj(tokens[:, :, 0]).unflatten(1, (heads, -1)) * (channels // heads) ** -0.5
    key_weight = pool.k_proj.weight.unflatten(0, (heads, -1))  # [A, C / A, C]
    value_weight = pool.v_proj.weight.unflatten(0, (heads, -1))
    logits = torch.einsum("rad,adc->rac", queries, key_weight) @ tokens  # [R, A, T]
    # Equal for all tokens, so without effect on the softmax; it gives the bias a zero gradient, which DDP needs.
    logits = logits + (queries * pool.k_proj.bias.unflatten(0, (heads, -1))).sum(dim=2, keepdim=True)
    attention = logits.float().softmax(dim=2).to(tokens.dtype)
    attended = attention @ tokens.mT  # [R, A, C]
    values = torch.einsum("rac,adc->rad", attended, value_weight).flatten(1)
    return pool.c_proj(values + pool.v_proj.bias.to(values.dtype))


def attention_pool_regions(
    pool: "AttentionPool2d", feature_map: torch.Tensor, rois: torch.Tensor, spatial_scale: float, batch_size: int = 128
) -> torch.Tensor:
    """RoIAlign to the pool's native grid (7, 9, 12, 14 cells per side for RN50, x4, x16, x64), then attention pooling.

    Args:
        pool: open_clip's AttentionPool2d.
        feature_map: Tensor [N, C, h, w], the input of the pool.
        rois: Tensor [R, 5], (index of the image, x1, y1, x2, y2), boxes in pixels of the network's input.
        spatial_scale: cells of the map per pixel, 1/32.
        batch_size: regions per call of the pool; without gradients it bounds the memory for any R.

    Returns:
        Tensor [R, D] float32, unit rows.
    """
    grid = math.isqrt(len(pool.positional_embedding) - 1)
    feature_map = feature_map.float()  # boxes in half precision would be off by pixels
    parts = []
    for chunk in rois.float().split(batch_size):
        maps = roi_align(feature_map, chunk, grid, spatial_scale, sampling_ratio=-1, aligned=True)
        parts.append(F.normalize(attention_pool(pool, maps.to(pool.c_proj.weight.dtype)).float(), dim=1))
    return torch.cat(parts)
