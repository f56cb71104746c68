"""Trunks beside Detectron2's own; importing this package registers them."""

from ovdet2.modeling.backbone.clip_resnet import CLIPResNet, build_clip_resnet_backbone
from ovdet2.modeling.backbone.timm_swin import TimmSwin, build_timm_swin_backbone

__all__ = ["CLIPResNet", "TimmSwin", "build_clip_resnet_backbone", "build_timm_swin_backbone"]
