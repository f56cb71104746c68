"""Detectron2's MaskRCNNConvUpsampleHead with a norm after the transposed convolution too."""

from __future__ import annotations

from typing import Any, cast

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead
from torch import nn


@ROI_MASK_HEAD_REGISTRY.register()
class NormalizedMaskHead(MaskRCNNConvUpsampleHead):
    """The mask head of the F-VLM release: every convolution but the last is followed by a norm and a ReLU.

    Detectron2's head has a norm (MODEL.ROI_MASK_HEAD.NORM) after the 3x3 convolutions only. Without a norm they are the
    same.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, conv_norm: str = "", **kwargs: Any) -> None:
        """
        Args:
            input_shape: of the pooled features.
            conv_norm: Detectron2 name of the norm; "" for none.
            kwargs: as of :class:`MaskRCNNConvUpsampleHead`.
        """
        super().__init__(input_shape, conv_norm=conv_norm, **kwargs)
        if conv_norm:
            norm = cast(nn.Module, get_norm(conv_norm, self.deconv.out_channels))
            self.deconv.bias = None  # the norm has one
            # The head is a Sequential: this keeps the position between transposed convolution and predictor.
            self.deconv_relu = nn.Sequential(norm, nn.ReLU())
