"""Multi-scale deformable attention as a weighted sum of table rows: the kernel for CPUs.

Bilinear sampling followed by the weighted sum over levels and points is one sum of ``4 * levels * points`` rows of the
value table per (query, head). This is ``embedding_bag`` with per-sample weights, which does not store the sampled
values. The gradient of the value is the transposed sum, a second ``embedding_bag`` over the points sorted by cell. The
gradient of the weights is a sampled matrix product. The backward pass computes indices and corner weights again, so
that only the three inputs are saved. As custom operators the passes cause no graph break in torch.compile.

Shapes: B images, S tokens, Q queries, H heads, L levels, P points, c channels per head. A *cell* is the square of four
neighbouring pixels around a sampling point, numbered by its upper left pixel in maps with a border of zeros.
"""

import functools
import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

# Stated, since torch 2.6 cannot infer them from list[int].
FORWARD_SCHEMA = "(Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> Tensor"
BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor value, SymInt[] shapes, Tensor locations, Tensor weights) -> (Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("ovdet2::ms_deform_attn_bag", mutates_args=(), schema=FORWARD_SCHEMA)
def ms_deform_attn_bag(value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Forward pass.

    Args:
        value: float32 or float64 Tensor [B, S, H, c].
        shapes: height and width of every level, flattened: 2 L numbers.
        locations: Tensor [B, Q, H, L, P, 2], (x, y), normalised to [0, 1] in each level.
        weights: Tensor [B, Q, H, L, P].

    Returns:
        Tensor [B, Q, H * c].
    """
    b, q, h = locations.shape[:3]
    if locations.numel() == 0:
        return value.new_zeros(b, q, h * value.shape[3])
    levels = _Levels(shapes, locations, weights)
    table = levels.pad(value).flatten(0, 2)
    rows = F.embedding_bag(
        levels.corner_rows().flatten(0, 2).flatten(1),
        table,
        mode="sum",
        per_sample_weights=levels.corner_weights().flatten(0, 2).flatten(1),
    )
    return rows.view(b, q, -1)


@torch.library.custom_op("ovdet2::ms_deform_attn_bag_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def ms_deform_attn_bag_backward(
    grad: Tensor, value: Tensor, shapes: list[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, from the gradient of the output, Tensor [B, Q, H * c]."""
    if locations.numel() == 0:
        return torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)
    levels = _Levels(shapes, locations, weights)
    grad_rows = grad.reshape(-1, value.shape[3])
    corner_weights = levels.corner_weights()
    dots = _row_products(grad_rows, levels.pad(value).flatten(0, 2), levels.corner_rows(), corner_weights)
    grad_locations, grad_weights = levels.point_gradients(dots)
    del dots
    return levels.value_gradient(grad_rows, corner_weights, value.shape), grad_locations, grad_weights


@ms_deform_attn_bag.register_fake
def _(value, shapes, locations, weights):
    b, q, h = locations.shape[:3]
    return value.new_empty(b, q, h * value.shape[3])


@ms_deform_attn_bag_backward.register_fake
def _(grad, value, shapes, locations, weights):
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format),
        torch.empty_like(locations, memory_format=torch.contiguous_format),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
    )


def _save(ctx, inputs, output):
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradients(ctx, grad):
    value, locations, weights = ctx.saved_tensors
    grads = ms_deform_attn_bag_backward(grad, value, ctx.shapes, locations, weights)
    return grads[0], None, grads[1], grads[2]


ms_deform_attn_bag.register_autograd(_gradients, setup_context=_save)


class _Levels:
    """Indices and weights of the sampling points of all levels in a table of zero-bordered maps.

    In the table a map of height h and width w has h + 3 rows of w + 1 pixels, and 2 more pixels. The zero at the left
    of a row is also the zero at the right of the row above. Points on the far border
    read the pixels below the map with weight zero. Since coordinates are clamped, no corner needs a bounds check.
    """

    def __init__(self, shapes, locations, weights):
        b, q, h, num_levels, p, _ = locations.shape
        self.sizes = list(zip(shapes[::2], shapes[1::2]))
        self.starts = [0]
        for height, width in self.sizes:
            self.starts.append(self.starts[-1] + (height + 3) * (width + 1) + 2)
        self.num_pixels = self.starts[-1]
        self.lead = (b, q, h)
        self.num_points = num_levels * p
        self.num_rows = b * self.num_pixels * h
        self.index_dtype = torch.int32 if self.num_rows < 2**31 else torch.int64
        self.device = locations.device
        self.weights = weights.reshape(b, q, h, num_levels * p)
        # The last dimension of every elementwise operation has length h * l * p: torch does not vectorise shorter ones.
        points = locations.reshape(b * q, h * num_levels * p, 2)
        self.width = self._per_point([width for _, width in self.sizes], locations.dtype).repeat(h)
        self.height = self._per_point([height for height, _ in self.sizes], locations.dtype).repeat(h)
        self.x, left, self.fx = _split(points[..., 0], self.width)
        self.y, top, self.fy = _split(points[..., 1], self.height)
        # Exact in float32 below 2^24 pixels per level. A NaN location gives the smallest integer, clamped to 0.
        cells = top.mul_(self.width + 1).add_(left).to(self.index_dtype).clamp_(min=0)
        self.cells = cells.view(*self.lead, self.num_points)

    def pad(self, value):
        """Add the zero borders: Tensor [B, S, H, c] -> [B, pixels, H, c]."""
        table = value.new_zeros(value.shape[0], self.num_pixels, *value.shape[2:])
        token = 0
        for (height, width), start in zip(self.sizes, self.starts):
            rows = table[:, start : start + (height + 2) * (width + 1)].unflatten(1, (height + 2, width + 1))
            rows[:, 1:-1, 1:] = value[:, token : token + height * width].unflatten(1, (height, width))
            token += height * width
        return table

    def corner_rows(self):
        """Row of the table [B * pixels * H, c] of each corner: Tensor [B, Q, H, 4, L * P]."""
        first = self._first_rows()
        stride = self._per_point([width + 1 for _, width in self.sizes], self.index_dtype)
        corners = torch.stack([torch.zeros_like(stride), torch.ones_like(stride), stride, stride + 1])
        offsets = first.unsqueeze(-2) + corners * self.lead[2]
        return torch.add(offsets, self.cells.unsqueeze(-2), alpha=self.lead[2])

    def corner_weights(self):
        """Weight of each corner: Tensor [B, Q, H, 4, L * P]."""
        fx, fy = self.fx.view_as(self.cells), self.fy.view_as(self.cells)
        bottom = fy * self.weights
        top = self.weights - bottom
        bottom_right, top_right = bottom * fx, top * fx
        return torch.stack([top - top_right, top_right, bottom - bottom_right, bottom_right], dim=-2)

    def point_gradients(self, dots):
        """(gradient of locations, of weights) from the corners' dot products with the gradient, [B, Q, H, 4, L * P]."""
        fx, fy = self.fx.view_as(self.cells), self.fy.view_as(self.cells)
        top_left, top_right, bottom_left, bottom_right = dots.unbind(-2)
        along_top, along_bottom = top_right - top_left, bottom_right - bottom_left
        top = torch.addcmul(top_left, fx, along_top)
        down = torch.addcmul(bottom_left, fx, along_bottom).sub_(top)
        grad_weights = torch.addcmul(top, fy, down)
        grad_x = torch.addcmul(along_top, fy, along_bottom.sub_(along_top)).mul_(self.weights)
        grad_y = down.mul_(self.weights)
        grads = [
            torch.where((u >= 0) & (u < size + 1), grad.view_as(u) * size, 0)
            for grad, u, size in ((grad_x, self.x, self.width), (grad_y, self.y, self.height))
        ]
        shape = (*self.lead, len(self.sizes), -1)
        return torch.stack(grads, dim=-1).view(*shape, 2), grad_weights.view(shape)

    def value_gradient(self, grad_rows, corner_weights, shape):
        """Gradient of the value, the transposed sum: Tensor [B, S, H, c].

        Points are sorted by cell, so that the points of a cell form one bag. The sums of the four corners are then
        shifted to their pixels and added.
        """
        rows = torch.add(self._first_rows(), self.cells, alpha=self.lead[2]).flatten()
        offsets = rows.new_zeros(self.num_rows + 1)
        torch.cumsum(torch.bincount(rows, minlength=self.num_rows), 0, out=offsets[1:])
        order = rows.sort().indices
        bags = torch.div(order, self.num_points, rounding_mode="floor").to(self.index_dtype)
        gradient = grad_rows.new_zeros(shape)
        for corner in range(4):
            # index_select is ten times as fast here as indexing with [order].
            sorted_weights = corner_weights[..., corner, :].flatten().index_select(0, order)
            sums = F.embedding_bag(
                bags, grad_rows, offsets, mode="sum", per_sample_weights=sorted_weights, include_last_offset=True
            )
            self._add_shifted(gradient, sums.view(shape[0], -1, *shape[2:]), corner)
        return gradient

    def _add_shifted(self, gradient, sums, corner):
        """Add the sums of one corner per cell, Tensor [B, pixels, H, c], to the pixels of that corner."""
        down, right, token = corner // 2, corner % 2, 0
        for (height, width), start in zip(self.sizes, self.starts):
            maps = sums[:, start : start + (height + 2) * (width + 1)].unflatten(1, (height + 2, width + 1))
            target = gradient[:, token : token + height * width].unflatten(1, (height, width))
            target += maps[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
            token += height * width

    def _first_rows(self):
        """Row of the first pixel of each point's level, image and head: Tensor [B, 1, H, L * P]."""
        b, _, h = self.lead
        starts = self._per_point(self.starts[:-1], self.index_dtype) * h
        heads = torch.arange(h, dtype=self.index_dtype, device=self.device)[:, None]
        images = torch.arange(b, dtype=self.index_dtype, device=self.device)[:, None, None, None]
        return images * (self.num_pixels * h) + heads + starts

    def _per_point(self, numbers, dtype):
        """One number per level -> Tensor [L * P]."""
        numbers = torch.tensor(numbers, dtype=dtype, device=self.device)
        return numbers.repeat_interleave(self.num_points // len(self.sizes))


def _split(locations, size):
    """Coordinates of points along one axis of a zero-bordered map, in which the centre of the map's pixel 0 is at 1.

    Args:
        locations: Tensor [N, points], normalised to [0, 1] in the map.
        size: Tensor [points], number of pixels of the map along the axis.

    Returns:
        (coordinates, cells, fractions), each a floating-point Tensor [N, points]: the coordinate before clamping to
        [0, size + 1]; the coordinate of the cell's first pixel; and the fraction within the cell, in [0, 1).
    """
    u = torch.mul(locations, size).add_(0.5)
    clamped = torch.clamp(u, min=torch.zeros_like(size), max=size + 1)
    cells = clamped.floor()
    return u, cells, clamped.sub_(cells)


def _row_products(left, right, columns, values):
    """Dot products of rows: ``out[n, ...] = left[n] . right[columns[n, ...]]``.

    Args:
        left: Tensor [N, c].
        right: Tensor [R, c].
        columns: integer Tensor with N x k elements.
        values: Tensor of the shape of ``columns``; its content is not used.

    Returns:
        Tensor of the shape of ``columns``.
    """
    _consume_beta_warning()
    per_row = columns.numel() // len(left)
    crow = torch.arange(0, columns.numel() + 1, per_row, dtype=columns.dtype, device=columns.device)
    pattern = torch.sparse_csr_tensor(
        crow, columns.flatten(), values.flatten(), size=(len(left), len(right)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values().view(columns.shape)


@functools.cache
def _consume_beta_warning():
    """Suppress torch's warning, given once per process, that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], size=(1, 1))
