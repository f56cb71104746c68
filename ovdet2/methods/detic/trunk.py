"""Trunks of Detic's detectors, from timm, and the pyramid P3 to P7 on them.

Shapes: B images, C channels, h and w cells of a level.
"""

from __future__ import annotations

from typing import Any

import timm
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import Tensor

from ovdet2.errors import UsageError
from ovdet2.modeling.backbone import TimmSwin
from ovdet2.modeling.backbone.timm_swin import swin_trunk
from ovdet2.modeling.backbone.trunk import Trunk

MAPS = ("res3", "res4", "res5")


class TimmTrunk(Trunk):
    """The maps of strides 8, 16 and 32 of a ResNet or ConvNeXt of timm.

    Batch norms are frozen. ConvNeXt's maps have no norm after the last block.

    Attributes:
        base: timm's network, under the name that it has in Detic's checkpoints.
    """

    def __init__(self, architecture: str) -> None:
        """
        Args:
            architecture: timm name, such as "resnet50".

        Raises:
            UsageError: timm has no such ResNet or ConvNeXt.
        """
        super().__init__()
        if not architecture.startswith(("resnet", "convnext")) or not timm.is_model(architecture):
            raise UsageError(
                f"MODEL.DETIC.TRUNK is {architecture!r}: choose a ResNet, ConvNeXt or Swin Transformer of timm, such as "
                "resnet50, convnext_tiny or swin_base_patch4_window7_224."
            )
        # timm counts a ResNet's stem as its first map.
        indices = (2, 3, 4) if architecture.startswith("resnet") else (1, 2, 3)
        base: Any = timm.create_model(architecture, pretrained=False, features_only=True, out_indices=indices)
        self._out_features = list(MAPS)
        self._out_feature_channels = dict(zip(MAPS, base.feature_info.channels()))
        self._out_feature_strides = dict(zip(MAPS, base.feature_info.reduction()))
        self.base = FrozenBatchNorm2d.convert_frozen_batchnorm(base)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Tensor [B, 3, H, W], normalised, with sides that are multiples of 32 -> maps [B, C, h, w] by name."""
        return dict(zip(MAPS, self.base(images)))


@BACKBONE_REGISTRY.register()
def build_detic_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The pyramid P3 to P7 on MODEL.DETIC.TRUNK; P6 and P7 are convolutions of stride 2 on P5.

    Raises:
        UsageError: timm has no such trunk.
    """
    name, fpn = cfg.MODEL.DETIC.TRUNK, cfg.MODEL.FPN
    # No stochastic depth: it is for training.
    trunk = TimmSwin(swin_trunk(name, drop_path=0.0), MAPS) if name.startswith("swin_") else TimmTrunk(name)
    top = LastLevelP6P7(fpn.OUT_CHANNELS, fpn.OUT_CHANNELS, in_feature="p5")
    return FPN(trunk, MAPS, fpn.OUT_CHANNELS, fpn.NORM, top_block=top, fuse_type=fpn.FUSE_TYPE)
