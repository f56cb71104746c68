"""CLIP's ResNet as a trunk: the image tower of the teacher without its attention pool."""

import copy

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import BACKBONE_REGISTRY, Backbone

from ovdet2.errors import UsageError
from ovdet2.modeling.build import build_teacher

_STAGES = ("stem", "res2", "res3", "res4", "res5")
_STRIDES = (4, 4, 8, 16, 32)


class CLIPResNet(Backbone):
    """The maps of open_clip's ModifiedResNet, strides 4 to 32.

    Its batch normalisation is frozen, statistics and affine part, whatever else is trained: batches of a detector are
    too small to follow. Sides that are no multiple of 32 lose up to a cell, as CLIP's average pools leave out what does
    not fill a window.
    """

    def __init__(self, visual, out_features=("res3", "res4", "res5"), freeze_at=0):
        """
        Args:
            visual: open_clip ModifiedResNet; it is copied, not changed.
            out_features: of "res2" to "res5", finest first.
            freeze_at: stages that are not trained: 0 none, 1 the stem, 2 also res2, ..., 5 all.

        Raises:
            UsageError: another kind of image tower, or an unknown map.
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
        visual = copy.deepcopy(visual)
        visual.attnpool = None
        self.visual = FrozenBatchNorm2d.convert_frozen_batchnorm(visual).requires_grad_(True)
        self._out_features = list(out_features)
        self._indices = [_STAGES.index(name) for name in out_features]
        stages = self._stages()
        for stage in stages[:freeze_at]:
            for module in stage:
                module.requires_grad_(False)
        for stage in stages[max(self._indices) + 1 :]:  # not computed, hence without a gradient
            for module in stage:
                module.requires_grad_(False)
        width = visual.conv3.out_channels
        channels = (width, *(width * 4 * 2**level for level in range(4)))
        self._out_feature_channels = dict(zip(_STAGES, channels))
        self._out_feature_strides = dict(zip(_STAGES, _STRIDES))

    def _stages(self):
        """The modules of each of :data:`_STAGES` that have parameters."""
        visual = self.visual
        stem = [getattr(visual, f"{kind}{number}") for kind in ("conv", "bn") for number in (1, 2, 3)]
        return [stem, [visual.layer1], [visual.layer2], [visual.layer3], [visual.layer4]]

    def forward(self, images):
        """
        Args:
            images: Tensor [B, 3, H, W], normalised by CLIP's mean and standard deviation, RGB.

        Returns:
            dict of name to Tensor [B, C, floor(H / stride), floor(W / stride)].
        """
        found = self.visual.forward_intermediates(
            images, indices=self._indices, stop_early=True, intermediates_only=True
        )
        order = sorted(self._indices)
        maps = dict(zip((_STAGES[index] for index in order), found["image_intermediates"]))
        return {name: maps[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_clip_resnet_backbone(cfg, input_shape):
    """The trunk of MODEL.TEACHER with MODEL.RESNETS.OUT_FEATURES, frozen up to MODEL.BACKBONE.FREEZE_AT.

    Raises:
        UsageError: the teacher is no ResNet, or INPUT.FORMAT, MODEL.PIXEL_MEAN or PIXEL_STD are not the teacher's:
            other pixels than CLIP was trained with give other features, and nothing fails.
    """
    teacher = build_teacher(cfg)
    trunk = CLIPResNet(teacher.clip.visual, cfg.MODEL.RESNETS.OUT_FEATURES, cfg.MODEL.BACKBONE.FREEZE_AT)
    wanted = [(255 * values.flatten()).tolist() for values in (teacher.mean, teacher.std)]
    given = [cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD]
    same = torch.allclose(torch.tensor(wanted), torch.tensor(given, dtype=torch.float32), atol=0.1)
    if cfg.INPUT.FORMAT != "RGB" or not same:
        mean, std = ([round(value, 3) for value in values] for values in wanted)
        raise UsageError(
            f"{teacher.fingerprint.architecture} was trained on RGB images with MODEL.PIXEL_MEAN {mean} and PIXEL_STD "
            f"{std}: set them, and INPUT.FORMAT to RGB (now {cfg.INPUT.FORMAT}, {list(given[0])}, {list(given[1])})."
        )
    return trunk
