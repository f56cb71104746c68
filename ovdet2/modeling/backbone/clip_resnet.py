"""CLIP's ResNet as a backbone: the stages of the teacher's image tower and, for region scores, its attention pool."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from ovdet2.errors import UsageError
from ovdet2.modeling.backbone.trunk import Trunk
from ovdet2.modeling.build import build_teacher, require_teacher_pixels
from ovdet2.vlm.dense import pool_regions

_STAGES = ("stem", "res2", "res3", "res4", "res5")
_STRIDES = (4, 4, 8, 16, 32)


class CLIPResNet(Trunk):
    """The maps of open_clip's ModifiedResNet, strides 4 to 32.

    Statistics and affine parameters of batch normalisation are always frozen, since the batches of a detector are too
    small for batch statistics. If a side is no multiple of 32, a map may be one cell smaller, since CLIP's average
    pools drop incomplete windows. With all stages frozen no activation is kept for a backward pass.
    """

    last_map = "res5"  # input of the attention pool

    def __init__(
        self,
        visual: nn.Module,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        freeze_at: int = 0,
        keep_pool: bool = False,
    ) -> None:
        """
        Args:
            visual: open_clip ModifiedResNet; it is copied, not changed.
            out_features: names among "res2" to "res5", finest first.
            freeze_at: number of frozen stages: 0 none, 1 the stem, 2 also res2, ..., 5 all.
            keep_pool: keep CLIP's attention pool, frozen, for :meth:`embed_regions`.

        Raises:
            UsageError: the image tower is of another kind, a map is unknown, or the pool's input map is missing.
        """
        super().__init__()
        if not hasattr(visual, "layer4") or not hasattr(visual, "stem"):
            raise UsageError(
                f"the image tower is a {type(visual).__name__}, no ResNet of CLIP: set MODEL.TEACHER.ARCHITECTURE to "
                "RN50, RN50x4, ..., or ovshapes-resnet."
            )
        unknown = set(out_features) - set(_STAGES[1:])
        if unknown or not out_features:
            raise UsageError(f"a CLIP ResNet has the maps {', '.join(_STAGES[1:])}, not {', '.join(out_features)}.")
        if keep_pool and self.last_map not in out_features:
            raise UsageError(f"CLIP's attention pool reads {self.last_map}: add it to MODEL.RESNETS.OUT_FEATURES.")
        visual = copy.deepcopy(visual)
        if not keep_pool:
            visual.register_module("attnpool", None)
        self.visual = FrozenBatchNorm2d.convert_frozen_batchnorm(visual).requires_grad_(True)
        if keep_pool:
            self.visual.attnpool.requires_grad_(False)
        self.frozen = freeze_at >= len(_STAGES)
        self._out_features = list(out_features)
        self._indices = [_STAGES.index(name) for name in out_features]
        stages = self._stages()
        for stage in stages[:freeze_at]:
            for module in stage:
                module.requires_grad_(False)
        for level in range(max(self._indices) + 1, len(_STAGES)):  # unused: open_clip would still compute them
            setattr(self.visual, f"layer{level}", nn.Identity())
        conv3 = visual.conv3
        assert isinstance(conv3, nn.Conv2d)  # the last of the stem
        width = conv3.out_channels
        channels = (width, *(width * 4 * 2**level for level in range(4)))
        self._out_feature_channels = dict(zip(_STAGES, channels))
        self._out_feature_strides = dict(zip(_STAGES, _STRIDES))

    def _stages(self) -> list[list[nn.Module]]:
        """The modules of each of :data:`_STAGES` that have parameters."""
        visual = self.visual
        stem = [getattr(visual, f"{kind}{number}") for kind in ("conv", "bn") for number in (1, 2, 3)]
        return [stem, [visual.layer1], [visual.layer2], [visual.layer3], [visual.layer4]]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A checkpoint may lack the statistics, such as one of a detector with another trunk. FrozenBatchNorm2d would
        # then silently use zeros and ones.
        for name, statistics in self.named_buffers():
            state_dict.setdefault(prefix + name, statistics)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images: Tensor [B, 3, H, W], normalised by CLIP's mean and standard deviation, RGB.

        Returns:
            dict of name to Tensor [B, C, floor(H / stride), floor(W / stride)].
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            outputs = self.visual.forward_intermediates(
                images, indices=self._indices, stop_early=True, intermediates_only=True
            )
        order = sorted(self._indices)
        maps = dict(zip((_STAGES[index] for index in order), outputs["image_intermediates"]))
        return {name: maps[name] for name in self._out_features}

    def embed_regions(self, last_map: torch.Tensor, boxes_xyxy: Sequence[torch.Tensor]) -> torch.Tensor:
        """CLIP embeddings of regions (F-VLM): RoIAlign to the attention pool's native grid, then the pool.

        Args:
            last_map: Tensor [N, C, h, w], "res5" of N images.
            boxes_xyxy: list of N Tensors [R_i, 4], in pixels of the network's input.

        Returns:
            Tensor [R_1 + ... + R_N, D] float32, unit rows.
        """
        return pool_regions(self.visual, last_map, boxes_xyxy)


@BACKBONE_REGISTRY.register()
def build_clip_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> CLIPResNet:
    """The trunk of MODEL.TEACHER with MODEL.RESNETS.OUT_FEATURES, frozen up to MODEL.BACKBONE.FREEZE_AT.

    Raises:
        UsageError: the teacher is no ResNet; see also :func:`~ovdet2.modeling.build.require_teacher_pixels`.
    """
    teacher = build_teacher(cfg)
    require_teacher_pixels(cfg, teacher)
    return CLIPResNet(teacher.clip.visual, cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.BACKBONE.FREEZE_AT)
