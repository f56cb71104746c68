"""A feature pyramid (FPN) on a CLIP trunk. It also returns the trunk's last map, on which CLIP scores regions.

Shapes: N images, R regions, D embedding dimension. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import nn

from ovdet2.errors import UsageError
from ovdet2.modeling.backbone.clip_resnet import CLIPResNet
from ovdet2.modeling.backbone.clip_vit import CLIPViT
from ovdet2.modeling.backbone.output_norm_fpn import OutputNormFPN
from ovdet2.modeling.backbone.trunk import Trunk
from ovdet2.modeling.build import build_teacher, require_teacher_pixels
from ovdet2.vlm.dense import is_vit

ALL_FROZEN = 5  # MODEL.BACKBONE.FREEZE_AT: the stem and four stages
CLIP_MAP = "clip"  # the name of the trunk's last map among the features


class GivenMaps(Backbone):
    """Identity in place of the FPN's bottom-up network: the FPN then takes feature maps as input, not images."""

    def __init__(self, shapes: dict[str, ShapeSpec]) -> None:
        """
        Args:
            shapes: dict of name to :class:`ShapeSpec` of the maps.
        """
        super().__init__()
        self._shapes = dict(shapes)

    def output_shape(self) -> dict[str, ShapeSpec]:  # pyrefly: ignore[bad-override]  Detectron2: keys of any type
        """The shapes of the maps."""
        return self._shapes

    def forward(  # pyrefly: ignore[bad-override]  Detectron2: no argument
        self, maps: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """dict of maps -> the same dict."""
        return maps


class CLIPPyramid(Trunk):
    """A CLIP trunk and the FPN on its maps; the features are the FPN's and, as "clip", the trunk's last map."""

    def __init__(self, trunk: CLIPResNet | CLIPViT, pyramid: FPN) -> None:
        """
        Args:
            trunk: :class:`CLIPResNet` with its pool, or :class:`CLIPViT`.
            pyramid: module, dict of the trunk's maps -> dict of levels, with ``output_shape`` and
                ``size_divisibility``; such as an :class:`FPN` over :class:`GivenMaps`.
        """
        super().__init__()
        self.trunk = trunk
        self.pyramid = pyramid

    @property
    def size_divisibility(self) -> int:
        """Number that height and width of the input must be multiples of."""
        return self.pyramid.size_divisibility

    def output_shape(self) -> dict[str, ShapeSpec]:
        """The shapes of the pyramid's levels."""
        return self.pyramid.output_shape()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensor [N, 3, H, W], normalised -> dict of maps by name."""
        maps = self.trunk(images)
        inputs = maps
        if images.device.type == "cpu":
            # CLIP's maps are channels_last. In this layout oneDNN takes 3 s instead of 0.5 for the gradient of a 3x3
            # convolution's weights (256 channels, 200 x 272, float32). All later layers would inherit the layout.
            inputs = {name: features.contiguous() for name, features in maps.items()}
        return {**self.pyramid(inputs), CLIP_MAP: maps[self.trunk.last_map]}

    def embed_regions(self, features: Mapping[str, torch.Tensor], boxes_xyxy: Sequence[torch.Tensor]) -> torch.Tensor:
        """CLIP embeddings of regions.

        Args:
            features: as returned by :meth:`forward`.
            boxes_xyxy: list of N Tensors [R_i, 4], in pixels of the network's input.

        Returns:
            Tensor [R_1 + ... + R_N, D] float32, unit rows.
        """
        return self.trunk.embed_regions(features[CLIP_MAP], boxes_xyxy)


def clip_pyramid(cfg: CfgNode, visual: nn.Module) -> CLIPPyramid:
    """The pyramid of MODEL.FPN on an open_clip image tower, frozen up to MODEL.BACKBONE.FREEZE_AT.

    Raises:
        UsageError: the tower has no dense features, the ViT is partly frozen, or a map is unknown; see
            :func:`build_fpn`.
    """
    freeze_at, names = cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.OUT_FEATURES
    if not is_vit(visual):
        trunk = CLIPResNet(visual, names, freeze_at, keep_pool=True)
    elif freeze_at in (0, ALL_FROZEN):
        trunk = CLIPViT(visual, names, freeze_at == ALL_FROZEN, cfg.MODEL.FPN.NORM, cfg.MODEL.CLIP_VIT.HALVE_CHANNELS)
    else:
        raise UsageError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: set {ALL_FROZEN} to freeze all of a CLIP ViT, or 0 to train it."
        )
    return CLIPPyramid(trunk, build_fpn(cfg, GivenMaps(trunk.output_shape())))


def build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """The FPN of MODEL.FPN on a network.

    Raises:
        UsageError: MODEL.FPN.FORM is unknown.
    """
    fpn = cfg.MODEL.FPN
    if fpn.FORM == "detectron2":
        top = LastLevelMaxPool()
        return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, top_block=top, fuse_type=fpn.FUSE_TYPE)
    if fpn.FORM == "output_norm":
        return OutputNormFPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, fuse_type=fpn.FUSE_TYPE)
    raise UsageError(f'MODEL.FPN.FORM is {fpn.FORM!r}: choose "detectron2" or "output_norm".')


@BACKBONE_REGISTRY.register()
def build_resnet_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet with the FPN of MODEL.FPN.FORM; with "detectron2" it is its "build_resnet_fpn_backbone"."""
    return build_fpn(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_clip_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> CLIPPyramid:
    """The :func:`clip_pyramid` of the teacher's image tower.

    Raises:
        UsageError: see :func:`clip_pyramid` and :func:`~ovdet2.modeling.build.require_teacher_pixels`.
    """
    teacher = build_teacher(cfg)
    require_teacher_pixels(cfg, teacher)
    return clip_pyramid(cfg, teacher.clip.visual)
