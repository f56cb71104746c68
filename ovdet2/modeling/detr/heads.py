"""Prediction heads on the decoder's hidden states: boxes and class logits.

Shapes: B images, N queries, C channels, D embedding, K words.
Names: ``_deltas`` box regression relative to proposals or references.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ovdet2.layers.cosine_classifier import RARE_BIAS, CosineClassifier
from ovdet2.vocabulary.bank import WordBank


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logit of values in [0, 1]; x and 1 - x are clamped to at least ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class BoxHead(nn.Module):
    """MLP of three layers: hidden state -> logits of (cx, cy, w, h), or deltas to the logits of a reference box."""

    def __init__(self, dim: int, size_bias: float = 0.0) -> None:
        """
        Args:
            dim: C.
            size_bias: initial logit of width and height; with -2, initial boxes cover 0.12 of the image along each
                side.
        """
        super().__init__()
        first, second, last = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(last.bias[2:], size_bias)
        self.layers = nn.ModuleList([first, second, last])

    def forward(self, hidden: Tensor) -> Tensor:
        """Tensor [..., C] -> [..., 4], at least float32."""
        return in_full_precision(self.layers[2], self.layers[1](self.layers[0](hidden).relu()).relu())


class ClosedSetBranch(nn.Linear):
    """Linear classifier over a fixed set of classes: the closed-set baseline, which has no novel classes."""

    def __init__(self, dim: int, num_classes: int) -> None:
        """
        Args:
            dim: C.
            num_classes: K.
        """
        super().__init__(dim, num_classes)
        nn.init.constant_(self.bias, RARE_BIAS)

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states, Tensor [B, N, C] -> logits [B, N, K], at least float32."""
        return in_full_precision(super().forward, input)


class TextBranch(CosineClassifier):
    """Text classifier of queries: logits ``s cos(e, t_k) + b`` with learned s and b, followed by a sigmoid per word.

    There is one per decoder layer. They share the detector's word bank, which is not a submodule of any.
    """

    def __init__(self, dim: int, bank: WordBank, scale: float = 1 / 0.07) -> None:
        """
        Args:
            dim: C.
            bank: word bank of the detector.
            scale: initial s; s is clamped to at most 100.

        Raises:
            UsageError: the scale is outside (0, 100].
        """
        super().__init__(dim, bank, scale=scale, bias=RARE_BIAS, owns_bank=False)


def in_full_precision(layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """``layer(hidden)`` in at least float32, also under autocast: bfloat16 rounds a logit of 3 to steps of 0.016."""
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
