"""Detectron2's FastRCNNConvFCHead with a norm after the fully connected layers too.

Shapes: R regions, C channels, S pooled side, F features.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead
from detectron2.utils.comm import get_world_size
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


@ROI_BOX_HEAD_REGISTRY.register()
class NormalizedBoxHead(FastRCNNConvFCHead):
    """The box head of the releases of ViLD and F-VLM: every convolution and every FC is followed by a norm and a ReLU.

    Detectron2's head has a norm (MODEL.ROI_BOX_HEAD.NORM) after the convolutions only. Without a norm of the FCs they are
    the same: same weights, same outputs.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, fc_norm: str = "", **kwargs: Any) -> None:
        """
        Args:
            input_shape: of the pooled features, C x S x S.
            fc_norm: Detectron2 name of the norm after each FC; "" for none.
            kwargs: conv_dims, fc_dims and conv_norm of :class:`FastRCNNConvFCHead`.
        """
        super().__init__(input_shape, **kwargs)
        if not fc_norm:
            return
        layers: OrderedDict[str, nn.Module] = (
            OrderedDict()
        )  # the head is a Sequential: the order is that of the forward pass
        for name, layer in self.named_children():
            layers[name] = layer
            if isinstance(layer, nn.Linear):
                layers[f"{name}_norm"] = VectorNorm(fc_norm, layer.out_features)
        for name in list(layers):
            self._modules.pop(name, None)
        for name, layer in layers.items():
            self.add_module(name, layer)

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: ShapeSpec
    ) -> dict[str, Any]:
        """Arguments from MODEL.ROI_BOX_HEAD.FC_NORM and the keys of :class:`FastRCNNConvFCHead`."""
        return super().from_config(cfg, input_shape) | {"fc_norm": cfg.MODEL.ROI_BOX_HEAD.FC_NORM}


class VectorNorm(nn.Module):
    """One of Detectron2's norms, which take maps, on vectors [R, F]."""

    def __init__(self, name: str, features: int) -> None:
        """
        Args:
            name: Detectron2 name of the norm, such as "BN", "SyncBN", "GN".
            features: F.
        """
        super().__init__()
        self.norm = cast(nn.Module, get_norm(name, features))

    def forward(self, x: Tensor) -> Tensor:
        """Tensor [R, F] -> [R, F]. A batch norm takes its running statistics for a single vector, which has none."""
        norm = self.norm
        synchronised = isinstance(norm, nn.SyncBatchNorm) and get_world_size() > 1
        if len(x) == 1 and norm.training and isinstance(norm, _BatchNorm) and not synchronised:
            return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        return norm(x[:, :, None, None]).flatten(1)
