"""Detectron2's StandardRPNHead with a norm after each convolution.

Shapes: N images, L levels, A anchors per cell, C channels, H_l x W_l cells of level l.
Names: ``_logits`` before softmax or sigmoid, ``_deltas`` box regression relative to proposals or references.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ovdet2.errors import NumericalError, UsageError
from ovdet2.modeling.rcnn.box_head import NormalizedBoxHead


@RPN_HEAD_REGISTRY.register()
class NormalizedRPNHead(StandardRPNHead):
    """The RPN head of the releases of ViLD and F-VLM: convolution, norm, ReLU, with convolutions shared by all levels.

    The norms are separate per level or shared. A shared batch norm has the statistics of one level at a time in
    training, since each level is one call of it. Without norm it is a StandardRPNHead: same weights, same outputs.
    """

    @configurable
    def __init__(self, *, norm: str = "", norm_per_level: bool = True, num_levels: int = 1, **kwargs: Any) -> None:
        """
        Args:
            norm: Detectron2 name of the norm; "" for none.
            norm_per_level: separate norms (parameters and statistics) for each level.
            num_levels: L.
            kwargs: in_channels, num_anchors, box_dim, conv_dims, as of :class:`StandardRPNHead`.
        """
        super().__init__(**kwargs)
        self.norms: nn.ModuleList | None = None  # [convolutions][L, or 1 if shared]
        if norm:
            copies = num_levels if norm_per_level else 1
            self.norms = nn.ModuleList()
            for conv in self._convs():
                conv.activation, conv.bias = None, None  # ReLU follows the norm, and the norm has a bias
                layers = (cast(nn.Module, get_norm(norm, conv.out_channels)) for _ in range(copies))
                self.norms.append(nn.ModuleList(layers))

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]
    ) -> dict[str, Any]:
        """Arguments from MODEL.RPN.NORM, NORM_PER_LEVEL and the keys of :class:`StandardRPNHead`."""
        return {
            **super().from_config(cfg, input_shape),
            "norm": cfg.MODEL.RPN.NORM,
            "norm_per_level": cfg.MODEL.RPN.NORM_PER_LEVEL,
            "num_levels": len(input_shape),
        }

    def _convs(self) -> list[Conv2d]:
        """The 3x3 convolutions, first to last."""
        convs = list(self.conv) if isinstance(self.conv, nn.Sequential) else [self.conv]
        return cast(list[Conv2d], convs)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            features: L maps [N, C, H_l, W_l], finest first.

        Returns:
            Per level the objectness logits [N, A, H_l, W_l], and the box deltas [N, 4A, H_l, W_l].
        """
        if self.norms is None:
            return super().forward(features)
        logits, deltas = [], []
        for level, hidden in enumerate(features):
            for conv, norms in zip(self._convs(), cast(Iterable[nn.ModuleList], self.norms)):
                norm = norms[level if len(norms) > 1 else 0]
                hidden = F.relu(norm(conv(hidden)))
            logits.append(self.objectness_logits(hidden))
            deltas.append(self.anchor_deltas(hidden))
        return logits, deltas


def require_finite_at_test(head: nn.Module, _: object, outputs: tuple[list[Tensor], list[Tensor]]) -> None:
    """A forward hook of an RPN head. Detectron2 drops proposals that are not finite, at test without a message: a
    diverged detector would find nothing.

    Raises:
        NumericalError: in evaluation mode, an output is not finite.
    """
    if not head.training and not all(torch.isfinite(level).all() for maps in outputs for level in maps):
        raise NumericalError(
            "the RPN has an output that is not finite: the training has diverged; use an earlier checkpoint."
        )


def require_norms_are_read(cfg: CfgNode) -> None:
    """Refuse a norm that the head of the RPN or of the boxes does not read.

    Raises:
        UsageError: MODEL.RPN.NORM or MODEL.ROI_BOX_HEAD.FC_NORM with another head.
    """
    rpn, box_head = cfg.MODEL.RPN, cfg.MODEL.ROI_BOX_HEAD
    if box_head.FC_NORM and not issubclass(ROI_BOX_HEAD_REGISTRY.get(box_head.NAME), NormalizedBoxHead):
        raise UsageError(
            f"MODEL.ROI_BOX_HEAD.NAME is {box_head.NAME}, which does not read MODEL.ROI_BOX_HEAD.FC_NORM "
            f'({box_head.FC_NORM}): set it to NormalizedBoxHead, or the norm to "".'
        )
    if rpn.NORM and not issubclass(RPN_HEAD_REGISTRY.get(rpn.HEAD_NAME), NormalizedRPNHead):
        raise UsageError(
            f"MODEL.RPN.HEAD_NAME is {rpn.HEAD_NAME}, which does not read MODEL.RPN.NORM ({rpn.NORM}): set it to "
            f'{NormalizedRPNHead.__name__}, or the norm to "".'
        )
