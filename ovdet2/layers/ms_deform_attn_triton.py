"""Multi-scale deformable attention as fused Triton kernels, forward and backward.

Each program handles a block of (query, head) rows with all their points, so that sampled values stay in registers.
Values may be in half precision; coordinates and sums are float32. The gradient of the value is summed with atomics, so
its last bits vary between runs, as with ``grid_sample``.

Shapes: B images, S tokens, Q queries, H heads, L levels, P points, c channels per head.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovdet2.layers.ms_deform_attn_bag import BACKWARD_SCHEMA, FORWARD_SCHEMA

_ROWS = 32  # (query, head) rows per program: tiles of 32 x 32 for the usual 32 channels


@triton.jit
def _clamped(position, size):
    """Clamp a position in pixels to just outside of the map: an infinite position would give NaN differences."""
    return tl.minimum(tl.maximum(position, -2.0), size + 1.0)


@triton.jit
def _corner(left, top, dx, dy, height, width, start, base, row_stride):
    """(whether a corner lies in the map, offset of its values) for a block of points."""
    column, row = left + dx, top + dy
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    # NaN coordinates are outside of every map, and are not converted to integers.
    token = tl.where(inside, row, 0.0).to(tl.int32) * width + tl.where(inside, column, 0.0).to(tl.int32)
    return inside, base + (start + token).to(tl.int64) * row_stride


@triton.jit
def _rows(num_rows, tokens, queries, H: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(rows, mask of existing rows, channels, mask of existing tile elements, offset of each row's first value)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    channels = tl.arange(0, CHANNELS)
    tile = live[:, None] & (channels < C)[None, :]
    image = (rows // (queries * H)).to(tl.int64)
    return rows.to(tl.int64), live, channels, tile, (image * tokens * H + rows % H) * C


# Batches differ in these sizes: without this, Triton would compile separate kernels for multiples of 16.
_SIZES = ["num_rows", "tokens", "queries"]


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    value,
    levels,
    locations,
    weights,
    output,
    num_rows,
    tokens,
    queries,
    H: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows, live, channels, tile, base = _rows(num_rows, tokens, queries, H, C, ROWS, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for level in range(L):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(P):
            at = rows * (L * P) + level * P + point
            x = _clamped(tl.load(locations + 2 * at, mask=live, other=0.0) * width - 0.5, width)
            y = _clamped(tl.load(locations + 2 * at + 1, mask=live, other=0.0) * height - 0.5, height)
            weight = tl.load(weights + at, mask=live, other=0.0)
            left, top = tl.floor(x), tl.floor(y)
            fx, fy = x - left, y - top
            for corner in tl.static_range(4):
                dx, dy = corner % 2, corner // 2
                inside, offset = _corner(left, top, dx, dy, height, width, start, base, H * C)
                share = weight * (fx if dx else 1.0 - fx) * (fy if dy else 1.0 - fy)
                address = value + offset[:, None] + channels[None, :]
                sampled = tl.load(address, mask=tile & inside[:, None], other=0.0).to(tl.float32)
                total += share[:, None] * sampled
    tl.store(output + rows[:, None] * C + channels[None, :], total.to(output.dtype.element_ty), mask=tile)


@triton.jit(do_not_specialize=_SIZES)
def _backward(
    grad,
    value,
    levels,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    num_rows,
    tokens,
    queries,
    H: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    rows, live, channels, tile, base = _rows(num_rows, tokens, queries, H, C, ROWS, CHANNELS)
    upstream = tl.load(grad + rows[:, None] * C + channels[None, :], mask=tile, other=0.0).to(tl.float32)
    for level in range(L):
        height, width = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1)
        start = tl.load(levels + 3 * level + 2)
        for point in tl.static_range(P):
            at = rows * (L * P) + level * P + point
            x = _clamped(tl.load(locations + 2 * at, mask=live, other=0.0) * width - 0.5, width)
            y = _clamped(tl.load(locations + 2 * at + 1, mask=live, other=0.0) * height - 0.5, height)
            weight = tl.load(weights + at, mask=live, other=0.0)
            left, top = tl.floor(x), tl.floor(y)
            fx, fy = x - left, y - top
            along_x = tl.zeros((ROWS,), tl.float32)
            along_y = tl.zeros((ROWS,), tl.float32)
            along_weight = tl.zeros((ROWS,), tl.float32)
            for corner in tl.static_range(4):
                dx, dy = corner % 2, corner // 2
                inside, offset = _corner(left, top, dx, dy, height, width, start, base, H * C)
                share_x = fx if dx else 1.0 - fx
                share_y = fy if dy else 1.0 - fy
                address = offset[:, None] + channels[None, :]
                mask = tile & inside[:, None]
                sampled = tl.load(value + address, mask=mask, other=0.0).to(tl.float32)
                product = tl.sum(sampled * upstream, axis=1)
                along_weight += share_x * share_y * product
                along_x += (share_y if dx else -share_y) * product
                along_y += (share_x if dy else -share_x) * product
                part = (weight * share_x * share_y)[:, None] * upstream
                tl.atomic_add(grad_value + address, part, mask=mask, sem="relaxed")
            tl.store(grad_weights + at, along_weight, mask=live)
            tl.store(grad_locations + 2 * at, along_x * weight * width, mask=live)
            tl.store(grad_locations + 2 * at + 1, along_y * weight * height, mask=live)


@torch.library.custom_op("ovdet2::ms_deform_attn_triton", mutates_args=(), schema=FORWARD_SCHEMA)
def ms_deform_attn_triton(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Forward pass.

    Args:
        value: float32, float16 or bfloat16 Tensor [B, S, H, c].
        shapes: height and width of every level, flattened: 2 L numbers.
        locations: float32 Tensor [B, Q, H, L, P, 2], (x, y), normalised to [0, 1] in each level.
        weights: float32 Tensor [B, Q, H, L, P].

    Returns:
        Tensor [B, Q, H * c] of the value's dtype.
    """
    b, q, h = locations.shape[:3]
    output = value.new_empty(b, q, h * value.shape[3])
    if output.numel():
        value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
        levels = _levels(tuple(shapes), value.device)
        _launch(_forward, (value, levels, locations, weights, output), value, locations)
    return output


@torch.library.custom_op("ovdet2::ms_deform_attn_triton_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def ms_deform_attn_triton_backward(
    grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, from the gradient of the output, Tensor [B, Q, H * c]."""
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    grad_value = torch.zeros_like(value, dtype=torch.float32)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    if grad.numel():
        inputs = (grad.contiguous(), value, _levels(tuple(shapes), value.device), locations, weights)
        _launch(_backward, (*inputs, grad_value, grad_locations, grad_weights), value, locations)
    return grad_value.to(value.dtype), grad_locations, grad_weights


@ms_deform_attn_triton.register_fake
def _(value, shapes, locations, weights):
    b, q, h = locations.shape[:3]
    return value.new_empty(b, q, h * value.shape[3])


@ms_deform_attn_triton_backward.register_fake
def _(grad, value, shapes, locations, weights):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (value, locations, weights))


def _save(ctx, inputs, output):
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    grads = ms_deform_attn_triton_backward(grad, value, ctx.shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


ms_deform_attn_triton.register_autograd(_gradients, setup_context=_save)


def _launch(kernel, tensors, value, locations):
    b, q, h, num_levels, p, _ = locations.shape
    _, tokens, _, c = value.shape
    rows = b * q * h
    sizes = {"H": h, "C": c, "L": num_levels, "P": p, "ROWS": _ROWS, "CHANNELS": triton.next_power_of_2(c)}
    # Triton launches on the current device, which may differ from the device of the tensors.
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(rows, _ROWS),)](*tensors, rows, tokens, q, **sizes)


@functools.lru_cache(maxsize=1024)
def _levels(shapes, device):
    """Height, width and first token of each level: int32 Tensor [L, 3] on the device.

    Cached, since a copy to the device waits for the kernels that are running there.
    """
    rows, start = [], 0
    for height, width in zip(shapes[::2], shapes[1::2]):
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)
