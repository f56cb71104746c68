"""Multi-scale deformable attention (Deformable DETR, Eq. 3), with several kernels that give the same result.

Shapes: B images, S tokens of all levels, Q queries, C channels, H heads, L levels, P points, c = C / H.
"""

import functools
import importlib.util
import logging
import math
import os
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from ovdet2.errors import SetupError, UsageError
from ovdet2.layers.ms_deform_attn_bag import ms_deform_attn_bag

logger = logging.getLogger(__name__)

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

KERNELS = {
    "bag": "weighted embedding_bag",
    "grid_sample": "grid_sample per level",
    "triton": "fused Triton kernel",
}


def ms_deform_attn(
    value: torch.Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    kernel: str = "auto",
) -> torch.Tensor:
    """Weighted sum of values sampled bilinearly around each query, zeros outside a map.

    The centre of pixel i of n is at (i + 0.5) / n. Half precision inputs are computed in float32, also under autocast.

    Args:
        value: Tensor [B, S, H, c], the levels one after another, each in row-major order.
        spatial_shapes: list of L (height, width), S = sum of their products.
        sampling_locations: Tensor [B, Q, H, L, P, 2], (x, y), normalised to [0, 1] in each level.
        attention_weights: Tensor [B, Q, H, L, P], normally summing to 1 over L and P.
        kernel: "auto" or a key of ``KERNELS``.

    Returns:
        Tensor [B, Q, H * c] of the value's dtype.

    Raises:
        UsageError: unknown kernel, S is not the sum of the level sizes, or float64 values for Triton.
        SetupError: the Triton kernel is requested but cannot run.
    """
    tokens = sum(height * width for height, width in spatial_shapes)
    if tokens != value.shape[1]:
        raise UsageError(
            f"the levels {list(spatial_shapes)} have {tokens} tokens, value has {value.shape[1]}: pass the shapes of "
            "the levels of value."
        )
    kernel = select_kernel(value.device.type, value.dtype) if kernel == "auto" else kernel
    if kernel not in KERNELS:
        raise UsageError(f"unknown kernel {kernel!r} of deformable attention: choose auto, {', '.join(KERNELS)}.")
    if not torch.compiler.is_compiling():
        _announce(kernel, value.device.type)
    dtype = value.dtype
    with torch.autocast(value.device.type, enabled=False):
        if kernel == "triton":  # converts half precision internally
            return _triton(value, spatial_shapes, sampling_locations.float(), attention_weights.float())
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        value, locations, weights = (t.to(exact) for t in (value, sampling_locations, attention_weights))
        if kernel == "grid_sample":
            return ms_deform_attn_grid_sample(value, spatial_shapes, locations, weights).to(dtype)
        sizes = [side for shape in spatial_shapes for side in shape]
        return ms_deform_attn_bag(value, sizes, locations, weights).to(dtype)


def select_kernel(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """The kernel that "auto" selects for a device type and a dtype, a key of ``KERNELS``."""
    if device_type == "cpu":
        return "bag"
    if device_type == "cuda" and dtype != torch.float64 and _TRITON_IS_INSTALLED:
        return "triton"
    return "grid_sample"


def describe_kernel(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """A line for logs, such as "deformable attention on cpu: bag (weighted embedding_bag)"."""
    kernel = select_kernel(device_type, dtype)
    return f"deformable attention on {device_type}: {kernel} ({KERNELS[kernel]})"


@functools.cache
def _announce(kernel, device_type):
    logger.info("deformable attention on %s: %s (%s)", device_type, kernel, KERNELS[kernel])


def _triton(value, spatial_shapes, locations, weights):
    if not value.is_cuda and not os.environ.get("TRITON_INTERPRET"):
        raise SetupError(f'the Triton kernel needs a CUDA device, the value is on {value.device}: use kernel "auto".')
    if value.dtype == torch.float64:
        raise UsageError('the Triton kernel computes in float32: for float64 use kernel "auto" or "grid_sample".')
    try:
        from ovdet2.layers.ms_deform_attn_triton import ms_deform_attn_triton
    except ImportError as error:
        raise SetupError(f'the Triton kernel cannot be loaded ({error}): install triton or use "auto".') from None
    sizes = [side for shape in spatial_shapes for side in shape]
    return ms_deform_attn_triton(value, sizes, locations, weights)


def ms_deform_attn_grid_sample(
    value: torch.Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """:func:`ms_deform_attn` level by level with ``grid_sample``, on any device, for inputs of one floating dtype.

    Arguments and result as of :func:`ms_deform_attn`.
    """
    b, _, h, c = value.shape
    q = locations.shape[1]
    maps = value.permute(0, 2, 3, 1).split([height * width for height, width in spatial_shapes], dim=-1)
    grids = (2 * locations - 1).transpose(1, 2)  # [B, H, Q, L, P, 2]
    weights = weights.transpose(1, 2)  # [B, H, Q, L, P]
    output = value.new_zeros(b * h, c, q)
    for level, (shape, tokens) in enumerate(zip(spatial_shapes, maps)):
        sampled = F.grid_sample(
            tokens.reshape(b * h, c, *shape),
            grids[:, :, :, level].flatten(0, 1),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )  # [B * H, c, Q, P]
        output = output + (sampled * weights[:, :, :, level].flatten(0, 1).unsqueeze(1)).sum(-1)
    return output.view(b, h * c, q).transpose(1, 2)


class MultiScaleDeformableAttention(nn.Module):
    """Deformable attention: each query attends to P points per level and head, at offsets predicted from the query."""

    def __init__(self, dim: int, heads: int = 8, levels: int = 4, points: int = 4, kernel: str = "auto") -> None:
        """
        Args:
            dim: C.
            heads, levels, points: H, L, P.
            kernel: of :func:`ms_deform_attn`.
        """
        super().__init__()
        if dim % heads:
            raise UsageError(f"{dim} channels cannot be divided among {heads} heads.")
        self.heads, self.levels, self.points, self.kernel = heads, levels, points, kernel
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self._reset_parameters()

    def _reset_parameters(self):
        """Initial offsets: point p of head k lies p pixels away in the k-th direction (for 8 heads, the 8 neighbours).

        All points have the same initial weight.
        """
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)
        offsets = directions[:, None, None] * steps[:, None]  # [H, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def sample(
        self, queries: torch.Tensor, references: torch.Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the sampling locations of the queries and the attention weight of each point.

        Args:
            queries: Tensor [B, Q, C], with positional embedding added.
            references: reference points or boxes, Tensor [B, Q, L, 2] of (x, y) or [B, Q, L, 4] of (cx, cy, w, h),
                normalised to [0, 1] in each level. Offsets are in pixels of the level for points, and in units of
                w / (2 P) and h / (2 P) for boxes.
            spatial_shapes: list of L (height, width).

        Returns:
            (sampling locations [B, Q, H, L, P, 2], attention weights [B, Q, H, L, P]), float32 at least.
        """
        b, q, _ = queries.shape
        offsets = self.sampling_offsets(queries).view(b, q, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(queries).view(b, q, self.heads, -1)
        if references.shape[-1] not in (2, 4):
            raise UsageError(f"reference points have 2 or 4 coordinates, not {references.shape[-1]}.")
        with torch.autocast(queries.device.type, enabled=False):
            exact = torch.promote_types(references.dtype, torch.float32)
            offsets, weights, references = offsets.to(exact), weights.to(exact), references.to(exact)
            weights = weights.softmax(-1).view(b, q, self.heads, self.levels, self.points)
            references = references[:, :, None, :, None]
            if references.shape[-1] == 2:
                scale = references.new_tensor([[1 / width, 1 / height] for height, width in spatial_shapes])[:, None]
            else:
                scale = references[..., 2:] * (0.5 / self.points)
            return references[..., :2] + offsets * scale, weights

    def forward(
        self,
        queries: torch.Tensor,
        references: torch.Tensor,
        tokens: torch.Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            queries, references, spatial_shapes: as of :meth:`sample`.
            tokens: Tensor [B, S, C], the feature maps to attend to.
            padding_mask: bool Tensor [B, S], True for padding tokens, whose value is set to zero.

        Returns:
            Tensor [B, Q, C].
        """
        locations, weights = self.sample(queries, references, spatial_shapes)
        return self.attend(locations, weights, tokens, spatial_shapes, padding_mask)

    def attend(
        self,
        locations: torch.Tensor,
        weights: torch.Tensor,
        tokens: torch.Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output for locations and weights of :meth:`sample`: Tensor [B, Q, C]."""
        value = self.value_proj(tokens)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.heads, -1))
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights, self.kernel))
