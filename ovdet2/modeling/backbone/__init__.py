"""Backbones in addition to Detectron2's; importing this package registers them."""

from ovdet2.modeling.backbone.clip_pyramid import CLIPPyramid, build_clip_fpn_backbone, build_resnet_pyramid_backbone
from ovdet2.modeling.backbone.clip_resnet import CLIPResNet, build_clip_resnet_backbone
from ovdet2.modeling.backbone.clip_vit import CLIPViT
from ovdet2.modeling.backbone.timm_swin import TimmSwin, build_timm_swin_backbone

__all__ = [
    "CLIPPyramid",
    "CLIPResNet",
    "CLIPViT",
    "TimmSwin",
    "build_clip_fpn_backbone",
    "build_clip_resnet_backbone",
    "build_resnet_pyramid_backbone",
    "build_timm_swin_backbone",
]
