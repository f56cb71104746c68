"""The Swin Transformer of the published detectors (Liu et al., ICCV 2021), from its equations.

A map is padded with zeros to multiples of the window w, at the right and bottom and after the norm. In every second
block the windows start s = w // 2 cells later, on a torus: the cell (y, x) is in the window ((y - s) mod H) // w. Cells
that the torus wraps round attend only to one another. Nothing is rolled here: cells are gathered by the index of their
window.

Names of weights are those of the published files.
"""

import torch
from torch.nn import functional as F


def swin_maps(weights, pixels, depths, heads, window, outputs):
    """The maps of the stages in ``outputs`` (0 to 3), each with its norm: {stage: Tensor [B, C, h, w]}.

    Args:
        weights: {name: Tensor}, of any one dtype.
        pixels: Tensor [B, 3, H, W], normalised.
        depths, heads: blocks and attention heads of each stage.
        window: w.
        outputs: stages whose maps are returned; the weights have a ``norm<stage>`` for each.
    """
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels, (0, -width % 4, 0, -height % 4))
    x = F.conv2d(pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    x = _norm(x.permute(0, 2, 3, 1), weights, "patch_embed.norm")  # [B, h, w, C] from here
    maps = {}
    for stage, depth in enumerate(depths):
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}"
            shift = 0 if number % 2 == 0 else window // 2
            x = x + _attention(
                _norm(x, weights, f"{block}.norm1"), weights, f"{block}.attn", heads[stage], window, shift
            )
            hidden = F.gelu(_linear(_norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1"))
            x = x + _linear(hidden, weights, f"{block}.mlp.fc2")
        if stage in outputs:
            maps[stage] = _norm(x, weights, f"norm{stage}").permute(0, 3, 1, 2)
        if stage + 1 < len(depths):
            x = _merged(x, weights, f"layers.{stage}.downsample")
    return maps


def _norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _attention(x, weights, name, heads, window, shift):
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1:3]
    y_torus = (torch.arange(rows) - shift) % rows
    x_torus = (torch.arange(columns) - shift) % columns
    windows = (y_torus // window)[:, None] * (columns // window) + (x_torus // window)[None]
    places = (y_torus % window)[:, None] * window + (x_torus % window)[None]
    wrapped = 2 * (torch.arange(rows) < shift).long()[:, None] + (torch.arange(columns) < shift).long()[None]
    # Row i of `cells` are the cells of window i, in the order of their places within it.
    cells = (windows * window**2 + places).flatten().argsort().view(-1, window**2)
    groups = wrapped.flatten()[cells]
    queries, keys, values = (
        part.flatten(1, 2)[:, cells].unflatten(-1, (heads, -1)).transpose(-3, -2)  # [B, windows, heads, w^2, C / heads]
        for part in _linear(x, weights, f"{name}.qkv").chunk(3, dim=-1)
    )
    logits = queries @ keys.transpose(-2, -1) * (channels // heads) ** -0.5
    y, x_ = torch.arange(window**2) // window, torch.arange(window**2) % window
    offsets = (y[:, None] - y[None] + window - 1) * (2 * window - 1) + x_[:, None] - x_[None] + window - 1
    logits = logits + weights[f"{name}.relative_position_bias_table"][offsets].permute(2, 0, 1)
    apart = groups[:, :, None] != groups[:, None, :]
    # The published networks add -100, which in float32 is not quite minus infinity.
    logits = logits - 100.0 * apart[None, :, None].to(logits)
    gathered = (logits.softmax(dim=-1) @ values).transpose(-3, -2).flatten(-2)
    out = torch.empty_like(x).flatten(1, 2)
    out[:, cells.flatten()] = gathered.flatten(1, 2)
    out = _linear(out, weights, f"{name}.proj")
    return out.view(batch, rows, columns, channels)[:, :height, :width]


def _merged(x, weights, name):
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    quarters = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    return _linear(_norm(torch.cat(quarters, dim=-1), weights, f"{name}.norm"), weights, f"{name}.reduction")
