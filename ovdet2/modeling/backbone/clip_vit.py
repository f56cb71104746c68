"""CLIP's Vision Transformer as a backbone: tokens of four blocks, resampled to strides 4, 8, 16 and 32.

Shapes: N images, H x W input, p patch in pixels, h x w patches, W_t width of the transformer, D embedding dimension.
Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

import copy
from collections.abc import Sequence

import torch
from detectron2.layers import get_norm
from torch import nn
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.modeling.backbone.trunk import Trunk
from ovdet2.vlm.dense import block_tokens, embed_patch_tokens, is_vit, pool_regions, stride_of

_LEVELS = ("res2", "res3", "res4", "res5")
_STRIDES = (4, 8, 16, 32)
_FACTORS = (4, 2, 1, 0.5)  # resolution of a level / resolution of the patches
_PARTS = ((1, 3), (1, 2), (2, 3), (1, 1))  # of the depth: blocks 4, 6, 8, 12 of 12


def read_blocks(depth: int) -> tuple[int, ...]:
    """0-based indices of the four blocks whose tokens are used: 3, 5, 7, 11 of 12 (F-ViT); the same fractions, rounded
    up, of other depths."""
    return tuple(-(-depth * numerator // denominator) - 1 for numerator, denominator in _PARTS)


class CLIPViT(Trunk):
    """F-ViT's backbone (CLIM and CLIPSelf): a frozen CLIP ViT and trained resampling layers.

    The last block runs without attention, so that each token describes its own patch. Positional embeddings are
    interpolated. Transposed convolutions upsample the tokens 2 and 4 times and keep the channels; with
    ``halve_channels`` each halves them, as in ViTDet. A max pool downsamples the tokens 2 times. With patches of 16
    pixels the strides are 4 to 32; other patch sizes are resampled bilinearly to these strides. The image is padded with
    zeros to a multiple of the patch size.
    """

    last_map = "tokens"  # [N, W_t, h, w] at the stride of the patches; input of embed_regions

    def __init__(
        self,
        visual: nn.Module,
        out_features: Sequence[str] = _LEVELS,
        frozen: bool = True,
        norm: str = "",
        halve_channels: bool = False,
    ) -> None:
        """
        Args:
            visual: open_clip VisionTransformer; it is copied, not changed.
            out_features: names among "res2" to "res5", finest first.
            frozen: CLIP is not trained, and none of its activations is kept for a backward pass.
            norm: Detectron2 name of the norm between two transposed convolutions; "" for none.
            halve_channels: each transposed convolution halves the channels.

        Raises:
            UsageError: an image tower without dense features (see :func:`~ovdet2.vlm.dense.is_vit`), a ResNet, or an
                unknown map.
        """
        super().__init__()
        if not is_vit(visual):
            raise UsageError(f"the image tower is a {type(visual).__name__}, no ViT of CLIP: use CLIPResNet.")
        unknown = set(out_features) - set(_LEVELS)
        if unknown or not out_features:
            raise UsageError(f"a CLIP ViT has the maps {', '.join(_LEVELS)}, not {', '.join(out_features)}.")
        self.visual = copy.deepcopy(visual).requires_grad_(not frozen)
        self.visual.ln_post.requires_grad_(False)  # only of the embeddings, which have no loss
        self.visual.proj.requires_grad_(False)
        self.frozen = frozen
        self.blocks = read_blocks(len(visual.transformer.resblocks))
        width, self._patch = visual.conv1.out_channels, stride_of(visual)
        self._out_features = list(out_features)
        # Channels after no, one and two transposed convolutions.
        widths = (width, width // 2, width // 4) if halve_channels else (width, width, width)
        self.resample = nn.ModuleDict({name: _resampler(_LEVELS.index(name), widths, norm) for name in out_features})
        self._out_feature_strides = dict(zip(_LEVELS, _STRIDES))
        self._out_feature_channels = dict(zip(_LEVELS, (widths[2], widths[1], width, width)))

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride. With other sizes the levels would cover different parts of the image."""
        return _STRIDES[-1]

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images: Tensor [N, 3, H, W], normalised by CLIP's mean and standard deviation, RGB; sides of at least 32.

        Returns:
            dict of name to Tensor [N, C, floor(H / stride), floor(W / stride)], and "tokens" [N, W_t, h, w] with
            h = ceil(H / p): output of the last block, before the norm.
        """
        height, width = images.shape[-2:]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = self.token_maps(images)
        features = {self.last_map: tokens[-1]}
        for name in self._out_features:
            level = _LEVELS.index(name)
            stride, factor = _STRIDES[level], _FACTORS[level]
            maps = self.resample[name](tokens[level])
            if self._patch != factor * stride:
                scale = self._patch / (factor * stride)
                maps = F.interpolate(maps, scale_factor=scale, mode="bilinear", recompute_scale_factor=False)
            features[name] = maps[:, :, : height // stride, : width // stride]
        return features

    def token_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The tokens of :attr:`blocks`: list of four Tensors [N, W_t, h, w]. The last block runs without attention."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self._patch, 0, -height % self._patch))
        grid = (images.shape[2] // self._patch, images.shape[3] // self._patch)
        tokens = block_tokens(self.visual, images, self.blocks)
        return [of_block[:, 1:].mT.unflatten(2, grid) for of_block in tokens]

    def embed_regions(self, last_map: torch.Tensor, boxes_xyxy: Sequence[torch.Tensor]) -> torch.Tensor:
        """CLIP embeddings of regions (F-ViT): RoIAlign 1x1 on the map of unit embeddings.

        Args:
            last_map: Tensor [N, W_t, h, w], "tokens" of N images.
            boxes_xyxy: list of N Tensors [R_i, 4], in pixels of the network's input.

        Returns:
            Tensor [R_1 + ... + R_N, D] float32, unit rows.
        """
        tokens = last_map.flatten(2).mT.to(self.visual.proj.dtype)
        embeddings = embed_patch_tokens(self.visual, tokens, last_map.shape[-2:])
        return pool_regions(self.visual, embeddings, boxes_xyxy)


def _resampler(level, widths, norm):
    """Module from the resolution of the patches to that of a level: 4, 2, 1 or 1/2 times."""
    width, after_one, after_two = widths
    if level == 0:
        return nn.Sequential(
            nn.ConvTranspose2d(width, after_one, 2, 2),
            get_norm(norm, after_one) or nn.Identity(),
            nn.GELU(),
            nn.ConvTranspose2d(after_one, after_two, 2, 2),
        )
    if level == 1:
        return nn.ConvTranspose2d(width, after_one, 2, 2)
    return nn.Identity() if level == 2 else nn.MaxPool2d(2, 2, ceil_mode=True)
