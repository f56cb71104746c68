"""Detectron2's MaskRCNNConvUpsampleHead with a norm after the transposed convolution too."""

from __future__ import annotations

from typing import Any, cast

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.roi_heads.mask_head import ROI_MASK_HEAD_REGISTRY, MaskRCNNConvUpsampleHead
from detectron2.utils.comm import get_world_size
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@ROI_MASK_HEAD_REGISTRY.register()
class NormalizedMaskHead(MaskRCNNConvUpsampleHead):
    """The mask head of the F-VLM release: every convolution but the last is followed by a norm and a ReLU.

    Detectron2's head has a norm (MODEL.ROI_MASK_HEAD.NORM) after the 3x3 convolutions only. Without a norm they are the
    same. A batch without regions goes through the head as well: with SyncBN every process must take part in its sums.
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

    def layers(self, x: Tensor) -> Tensor:
        """Pooled features [R, C, S, S] -> mask logits [R, K, 2S, 2S]."""
        if len(x) or not self.training:
            return super().layers(x)
        synchronised = get_world_size() > 1
        norms = [norm for norm in self.modules() if isinstance(norm, _BatchNorm)]
        for norm in norms:
            norm.training = synchronised and isinstance(norm, nn.SyncBatchNorm)
        try:
            return super().layers(x.new_zeros((1, *x.shape[1:])))[:0]  # a zero gradient reaches every parameter
        finally:
            for norm in norms:
                norm.training = True
