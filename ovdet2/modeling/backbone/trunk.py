"""The interface of our backbones: Detectron2's Backbone with type annotations."""

from __future__ import annotations

from abc import abstractmethod

from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor


class Trunk(Backbone):
    """A backbone: batch of images -> feature maps by name."""

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:  # pyrefly: ignore[bad-override]  Detectron2: no argument
        """Tensor [B, 3, H, W], normalised -> maps [B, C, h, w] by name."""

    def output_shape(self) -> dict[str, ShapeSpec]:  # pyrefly: ignore[bad-override]  Detectron2: keys of any type
        """Channels and strides of the maps."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }
