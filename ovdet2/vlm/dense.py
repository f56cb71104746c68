"""Dense features of a CLIP: a feature map of the whole image in one pass, and region embeddings pooled from it.

A ViT gives a map of embeddings, its last block without attention (MaskCLIP; CLIM and CLIPSelf). A ModifiedResNet gives
its last feature map, which its attention pool turns into embeddings (F-VLM). The tower is not changed. All functions
are differentiable except :func:`embed_regions_dense`.

Shapes: N images, R regions, H x W input in pixels, h x w map, C channels, D embedding dimension, W_t width of a ViT.
``visual`` is an open_clip image tower; ``pixels`` are normalised by the tower's mean and standard deviation. Boxes are
XYXY in pixels of the image that is passed with them, with pixel edges at integers.
Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align
from typing_extensions import TypeIs

from ovdet2.errors import UsageError
from ovdet2.vlm.attention_pool import attention_pool_regions
from ovdet2.vlm.crops import scale_boxes
from ovdet2.vlm.teacher import Teacher

if TYPE_CHECKING:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer


def is_vit(visual: nn.Module) -> TypeIs["VisionTransformer"]:
    """True for a VisionTransformer, False for a ModifiedResNet.

    Raises:
        UsageError: the tower is neither, or a VisionTransformer whose blocks or pooling are not CLIP's; the message
            names it.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if isinstance(visual, ModifiedResNet) and visual.attnpool is not None:
        return False
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type == "tok":
        if isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock):
            return True
    trunk = getattr(visual, "trunk", None)  # timm's towers, EVA02-CLIP among them
    name = (getattr(trunk, "pretrained_cfg", None) or {}).get("architecture") or type(trunk or visual).__name__
    raise UsageError(
        f"the image tower {name!r} ({type(visual).__name__}) has no dense features: choose an open_clip ViT (ViT-B-32, "
        "ViT-B-16, ViT-L-14, ovshapes-vit) or a ModifiedResNet (RN50, RN50x4, RN50x16, RN50x64, ovshapes-resnet)."
    )


def stride_of(visual: "VisionTransformer | ModifiedResNet") -> int:
    """Pixels per cell of the map, an int: the patch of a ViT, 32 for a ModifiedResNet."""
    return visual.conv1.stride[0] if is_vit(visual) else 32


def dense_map(
    visual: "VisionTransformer | ModifiedResNet", pixels: torch.Tensor, attention_free: bool = True
) -> torch.Tensor:
    """The feature map that regions are pooled from.

    A ViT: the tokens of the patches after the last block (see :func:`block_tokens`), each through ``ln_post`` and the
    projection. A ModifiedResNet: the output of its last stage, which its attention pool reads.

    Args:
        visual: image tower.
        pixels: Tensor [N, 3, H, W], normalised; a ViT ignores the remainder of H or W over the stride.
        attention_free: False keeps the attention of a ViT's last block, as in image classification.

    Returns:
        Tensor [N, D, h, w] of a ViT, [N, C, h, w] of a ModifiedResNet, in the tower's dtype, not normalised.

    Raises:
        UsageError: see :func:`is_vit`.
    """
    if not is_vit(visual):
        maps = visual.stem(pixels.to(visual.conv1.weight.dtype))
        return visual.layer4(visual.layer3(visual.layer2(visual.layer1(maps))))
    (tokens,) = block_tokens(visual, pixels, attention_free=attention_free)
    stride = stride_of(visual)
    return embed_patch_tokens(visual, tokens[:, 1:], (pixels.shape[2] // stride, pixels.shape[3] // stride))


def embed_patch_tokens(visual: "VisionTransformer", tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """A ViT's map of embeddings from its last tokens, each through ``ln_post`` and the projection.

    Args:
        visual: VisionTransformer.
        tokens: Tensor [N, h * w, W_t], of the patches, without the class token.
        grid: (h, w).

    Returns:
        Tensor [N, D, h, w], not normalised.
    """
    return (visual.ln_post(tokens) @ visual.proj).mT.unflatten(2, tuple(grid))


def block_tokens(
    visual: "VisionTransformer", pixels: torch.Tensor, blocks: Sequence[int] = (-1,), attention_free: bool = True
) -> list[torch.Tensor]:
    """Tokens after some blocks of a ViT, at any input size, without patch dropout.

    Args:
        visual: VisionTransformer.
        pixels: Tensor [N, 3, H, W], normalised.
        blocks: 0-based indices, negative ones from the end; F-ViT reads a CLIP ViT-B after blocks 3, 5, 7, 11.
        attention_free: compute the last block by :func:`attention_free_block`; the others are never changed.

    Returns:
        List of Tensor [N, 1 + h * w, W_t], one per index, the class token first.
    """
    depth = len(visual.transformer.resblocks)
    indices = [range(depth)[block] for block in blocks]
    tokens = _embed_patches(visual, pixels)
    free = depth - 1 if attention_free and depth - 1 in indices else None
    standard = {block for block in indices if block != free} | ({free - 1} if free else set())
    outputs = {}
    if standard:
        _, block_outputs = visual.transformer.forward_intermediates(tokens, indices=sorted(standard), stop_early=True)
        outputs = dict(zip(sorted(standard), block_outputs))
    if free is not None:
        block = cast("ResidualAttentionBlock", visual.transformer.resblocks[free])
        outputs[free] = attention_free_block(block, outputs.get(free - 1, tokens))
    return [outputs[block] for block in indices]


def attention_free_block(block: "ResidualAttentionBlock", tokens: torch.Tensor) -> torch.Tensor:
    """A CLIP block in which each token attends only to itself.

    With W_v, b_v the value rows of the attention's input projection and W_o, b_o its output projection::

        y = x + W_o (W_v ln_1(x) + b_v) + b_o
        z = y + mlp(ln_2(y))

    MaskCLIP replaces attention in this way. The residual and the MLP are kept as in the code of CLIM and CLIPSelf.

    Args:
        block: open_clip's ResidualAttentionBlock.
        tokens: Tensor [..., W_t].

    Returns:
        Tensor [..., W_t].
    """
    attention, width = block.attn, tokens.shape[-1]
    values = F.linear(block.ln_1(tokens), attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :])
    tokens = tokens + block.ls_1(attention.out_proj(values))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


def positional_embedding(visual: "VisionTransformer", grid: tuple[int, int]) -> torch.Tensor:
    """A ViT's positional embedding for a grid of patches, resized bicubically from the native grid as in CLIM's code.

    Args:
        visual: VisionTransformer.
        grid: (h, w).

    Returns:
        Tensor [1 + h * w, W_t], the class token's row first.
    """
    native = visual.positional_embedding
    if tuple(grid) == tuple(visual.grid_size):
        return native
    table = native[1:].T.unflatten(1, visual.grid_size)[None].float()
    resized = F.interpolate(table, tuple(grid), mode="bicubic", align_corners=False)[0].flatten(1).T
    return torch.cat([native[:1], resized.to(native.dtype)])


def pool_regions(
    visual: "VisionTransformer | ModifiedResNet",
    feature_map: torch.Tensor,
    boxes_xyxy: Sequence[torch.Tensor],
    batch_size: int = 128,
) -> torch.Tensor:
    """Embeddings of regions from :func:`dense_map`.

    A ViT: the map normalised per cell, RoIAlign 1x1 with adaptive sampling, normalised again (CLIM). A ModifiedResNet:
    :func:`~ovdet2.vlm.attention_pool.attention_pool_regions`.

    Args:
        visual: the tower that made the map.
        feature_map: Tensor [N, D or C, h, w].
        boxes_xyxy: list of N Tensors [R_i, 4], in pixels of the tower's input; they are clipped to the area of the map,
            at least a pixel wide and high.
        batch_size: regions per call of the attention pool.

    Returns:
        Tensor [R_1 + ... + R_N, D] float32, unit rows, in the order of the boxes.
    """
    stride = stride_of(visual)
    height, width = (stride * cells for cells in feature_map.shape[-2:])
    boxes = torch.cat([chunk.reshape(-1, 4) for chunk in boxes_xyxy]).to(feature_map.device, torch.float32)
    counts = torch.tensor([len(chunk) for chunk in boxes_xyxy], device=boxes.device)
    images = torch.repeat_interleave(torch.arange(len(counts), device=boxes.device), counts)
    rois = torch.cat([images[:, None].to(boxes), scale_boxes(boxes, 1.0, height, width)], dim=1)
    if not is_vit(visual):
        return attention_pool_regions(visual.attnpool, feature_map, rois, 1 / stride, batch_size)
    unit = F.normalize(feature_map.float(), dim=1)
    return F.normalize(roi_align(unit, rois, 1, 1 / stride, sampling_ratio=-1, aligned=True)[:, :, 0, 0], dim=1)


def resized_shape(height: int, width: int, side: int, edge: str, stride: int) -> tuple[int, int]:
    """(height, width) after scaling the longest or shortest edge to ``side``, each rounded to a multiple of ``stride``.

    Raises:
        UsageError: ``edge`` is neither "longest" nor "shortest".
    """
    if edge not in ("longest", "shortest"):
        raise UsageError(f"edge is {edge!r}: choose longest or shortest.")
    scale = side / (max if edge == "longest" else min)(height, width)
    height, width = (max(1, round(length * scale / stride)) * stride for length in (height, width))
    return height, width


@torch.no_grad()
def embed_regions_dense(
    teacher: Teacher,
    image: torch.Tensor,
    boxes_xyxy: torch.Tensor,
    side: int = 1024,
    edge: str = "longest",
    batch_size: int = 128,
    square: bool = False,
) -> torch.Tensor:
    """Region embeddings pooled from one forward pass over the image, unlike :func:`~ovdet2.vlm.crops.embed_regions`.

    The image is resized (anti-aliased, by the teacher's filter) to :func:`resized_shape`, and the boxes with it. It
    takes one image at a time, because the padding of a batch of different sizes would change the features of a ViT and
    of a ResNet.

    Args:
        teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
        image: Tensor [3, H, W] uint8, RGB.
        boxes_xyxy: Tensor [R, 4], pixels of ``image``.
        side: length of the edge after resizing, in pixels; CLIM's and F-VLM's is 1024.
        edge: "longest" or "shortest".
        batch_size: regions per call of the attention pool; bounds the memory for any R.
        square: scale the longest edge to ``side`` without rounding to the stride, and pad with black pixels at the right
            and bottom to a square, as CLIM and CLIPSelf evaluate. A ViT's positional embeddings then are those of a
            square, so that the embeddings differ.

    Returns:
        Tensor [R, D], unit-norm float32.

    Raises:
        UsageError: the teacher's tower has no dense features, see :func:`is_vit`; or a square of the shortest edge, or
            of a side that is no multiple of the stride.
    """
    visual, stride = teacher.clip.visual, stride_of(teacher.clip.visual)
    height, width = image.shape[-2:]
    if square:
        if edge != "longest" or side % stride:
            raise UsageError(
                f"a square of {side} px by the {edge} edge: give the longest edge, and a multiple of {stride} px."
            )
        scale = side / max(height, width)
        shape, factors = (max(1, round(height * scale)), max(1, round(width * scale))), (scale, scale)
    else:
        shape = resized_shape(height, width, side, edge, stride)
        factors = (shape[1] / width, shape[0] / height)
    if len(boxes_xyxy) == 0:
        return teacher.mean.new_zeros((0, teacher.embed_dim), dtype=torch.float32)
    pixels = image[None].to(teacher.mean) / 255
    resized = F.interpolate(pixels, shape, mode=teacher.interpolation, antialias=True).clamp(0, 1)
    if square:
        resized = F.pad(resized, (0, side - shape[1], 0, side - shape[0]))
    pixels = ((resized - teacher.mean) / teacher.std).contiguous(memory_format=torch.channels_last)
    boxes = boxes_xyxy.to(pixels.device, torch.float32) * torch.tensor(factors, device=pixels.device).repeat(2)
    return pool_regions(visual, dense_map(visual, pixels), [boxes], batch_size)


def _embed_patches(visual, pixels):
    """Tokens before the first block, [N, 1 + h * w, W_t]."""
    maps = visual.conv1(pixels.to(visual.conv1.weight.dtype))
    tokens = torch.cat([visual.class_embedding.to(maps.dtype).expand(len(maps), 1, -1), maps.flatten(2).mT], dim=1)
    return visual.ln_pre(tokens + positional_embedding(visual, maps.shape[2:]).to(maps.dtype))
