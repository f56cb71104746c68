"""timm's Swin Transformer as a backbone for images of any size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

from ovdet2.errors import DataError, UsageError
from ovdet2.io.weights import read_weights
from ovdet2.modeling.backbone.trunk import Trunk

_STAGES = ("res2", "res3", "res4", "res5")
_PATCH = 4


class PadThenShiftBlock(SwinTransformerBlock):
    """timm's block, on maps that are no multiple of the window.

    The published detectors pad the map and then shift it; timm shifts first, so that its padding is in the middle of
    the map. The two are equal only for multiples of the window.
    """

    def _attn(self, x: torch.Tensor) -> torch.Tensor:
        """Attention in windows: Tensor [B, H, W, C] -> [B, H, W, C]."""
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(x)[:, :height, :width]


class TimmSwin(Trunk):
    """The maps of a Swin Transformer, strides 4 to 32, each with a separate layer norm."""

    def __init__(self, trunk: SwinTransformer, out_features: Sequence[str] = ("res3", "res4", "res5")) -> None:
        """
        Args:
            trunk: SwinTransformer of :func:`swin_trunk`; stages that are not in ``out_features`` are removed.
            out_features: names among "res2" to "res5", finest first.

        Raises:
            UsageError: an unknown map.
        """
        super().__init__()
        unknown = set(out_features) - set(_STAGES)
        if unknown or not out_features:
            raise UsageError(f"a Swin Transformer has the maps {', '.join(_STAGES)}, not {', '.join(out_features)}.")
        self._out_features = list(out_features)
        self._indices = sorted(_STAGES.index(name) for name in out_features)
        info = trunk.feature_info
        self._out_feature_channels = {name: info[_STAGES.index(name)]["num_chs"] for name in out_features}
        self._out_feature_strides = {name: info[_STAGES.index(name)]["reduction"] for name in out_features}
        # Remove the last norm and the classifier: their weights would have no gradient.
        trunk.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        self.trunk = trunk
        self.norms = nn.ModuleDict({name: nn.LayerNorm(self._out_feature_channels[name]) for name in out_features})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images: Tensor [B, 3, H, W], normalised.

        Returns:
            dict of name to Tensor [B, C, ceil(H / stride), ceil(W / stride)].
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % _PATCH, 0, -height % _PATCH))
        features = self.trunk.forward_intermediates(images, indices=self._indices, intermediates_only=True)
        assert isinstance(features, list)  # "intermediates_only"
        maps = dict(zip((_STAGES[index] for index in self._indices), features))
        return {
            name: self.norms[name](maps[name].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for name in self._out_features
        }


def swin_trunk(
    architecture: str, drop_path: float = 0.2, checkpointing: bool = False, **changes: Any
) -> SwinTransformer:
    """A SwinTransformer for detection, with random weights.

    Window size and shift are the same in every stage and for every image size. By default timm sets both for its
    classification size, where the last stage is a single window without a shift. Maps are padded as in the published
    detectors, see :class:`PadThenShiftBlock`.

    Args:
        architecture: timm name, such as "swin_base_patch4_window7_224".
        drop_path: stochastic depth of the last block.
        checkpointing: gradient checkpointing: recompute activations in the backward pass to save memory.
        changes: further arguments of timm's SwinTransformer.

    Raises:
        UsageError: timm has no such Swin Transformer.
    """
    name = architecture.split(".")[0]
    if not name.startswith("swin_") or not timm.is_model(name):
        known = ", ".join(timm.list_models("swin_*"))
        raise UsageError(f"timm has no Swin Transformer {architecture!r}: choose one of {known}.")
    trunk = timm.create_model(
        name, pretrained=False, drop_path_rate=drop_path, strict_img_size=False, always_partition=True, **changes
    )
    assert isinstance(trunk, SwinTransformer)  # true of all timm names with this prefix
    for block in trunk.modules():
        if isinstance(block, SwinTransformerBlock):
            block.__class__ = PadThenShiftBlock  # timm's constructor takes no class of blocks
    trunk.set_grad_checkpointing(checkpointing)
    return trunk


def load_swin(trunk: SwinTransformer, path: str | Path) -> None:
    """Load timm's or Microsoft's classifier weights from a local file; the classification head is ignored.

    Raises:
        DataError: the file cannot be read, or lacks weights of the trunk.
    """
    weights = checkpoint_filter_fn(read_weights(path)["model"], trunk)
    weights = {name: value for name, value in weights.items() if not name.startswith("head.")}  # any number of classes
    try:
        missing = trunk.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        raise DataError(f"{path} does not fit the Swin Transformer of MODEL.SWIN.ARCHITECTURE: {error}") from None
    missing = [name for name in missing if not name.startswith("head.")]
    if missing:
        raise DataError(
            f"{path} lacks {len(missing)} weights of the Swin Transformer ({', '.join(missing[:3])}, ...): set "
            "MODEL.SWIN.ARCHITECTURE to the architecture of the file."
        )


@BACKBONE_REGISTRY.register()
def build_timm_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmSwin:
    """The backbone of MODEL.SWIN. Weights are read from MODEL.SWIN.WEIGHTS, unless MODEL.WEIGHTS names a detector."""
    swin = cfg.MODEL.SWIN
    trunk = swin_trunk(swin.ARCHITECTURE, swin.DROP_PATH, swin.CHECKPOINTING)
    if swin.WEIGHTS and not cfg.MODEL.WEIGHTS:
        load_swin(trunk, swin.WEIGHTS)
    return TimmSwin(trunk, swin.OUT_FEATURES)
