"""The feature pyramid of the releases of ViLD and F-VLM: norms on its outputs only, and a convolution for p6.

Shapes: N images, C channels, H_l x W_l cells of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import fvcore.nn.weight_init as weight_init
from detectron2.layers import get_norm
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import FPN
from torch import Tensor, nn
from torch.nn import functional as F


class OutputNormFPN(FPN):
    """An FPN whose norms follow the 3x3 output convolutions; the top-down path is not normalised.

    p6 is a 3x3 convolution of stride 2 on p5 before its norm, and has a norm too. Detectron2's FPN also normalises the
    lateral convolutions, and its p6 is p5 subsampled.
    """

    def __init__(
        self, bottom_up: Backbone, in_features: Sequence[str], out_channels: int, norm: str = "", fuse_type: str = "sum"
    ) -> None:
        """
        Args:
            bottom_up: network whose maps are fused.
            in_features: names of its maps, finest first; strides are consecutive powers of 2 up to 32.
            out_channels: C.
            norm: Detectron2 name of the norm; "" for none. As in Detectron2, convolutions have a bias only without it.
            fuse_type: "sum" or "avg", of the top-down path.
        """
        top = StridedLevel(out_channels, bias=not norm)
        super().__init__(bottom_up, in_features, out_channels, norm=norm, top_block=top, fuse_type=fuse_type)
        for conv in (*self.lateral_convs, *self.output_convs):
            conv.norm = None
        # Also of the outputs, since p6 is computed from p5 before its norm.
        norms = {name: cast(nn.Module, get_norm(norm, out_channels)) or nn.Identity() for name in self._out_features}
        self.norms = nn.ModuleDict(norms)

    def forward(self, x: dict[str, Tensor] | Tensor) -> dict[str, Tensor]:
        """
        Args:
            x: input of the bottom-up network.

        Returns:
            dict of "p2", ..., "p6" to Tensor [N, C, H_l, W_l].
        """
        return {name: self.norms[name](level) for name, level in super().forward(x).items()}


class StridedLevel(nn.Module):
    """p6: a 3x3 convolution of stride 2 on p5, in the form that :class:`FPN` takes as its top block.

    Padding is TensorFlow's "SAME": maps of an even side are padded by one cell at the bottom and right only.
    """

    num_levels = 1
    in_feature = "p5"

    def __init__(self, channels: int, bias: bool) -> None:
        """
        Args:
            channels: C, in and out.
            bias: whether the convolution has one.
        """
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, bias=bias)
        weight_init.c2_xavier_fill(self.conv)

    def forward(self, p5: Tensor) -> list[Tensor]:
        """Tensor [N, C, H, W] -> [Tensor [N, C, ceil(H / 2), ceil(W / 2)]]."""
        height, width = p5.shape[-2:]
        return [self.conv(F.pad(p5, (width % 2, 1, height % 2, 1)))]
