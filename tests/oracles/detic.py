"""Detic (Zhou et al., ECCV 2022) from its published equations, in plain torch, with the names of its checkpoints.

It imports nothing of ovdet2 and nothing of Detectron2. RoIAlign and NMS are torchvision's. From JPEG bytes to boxes,
scores, classes and masks of one image.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from tests.oracles.swin import swin_maps

MEAN, STD = (123.675, 116.280, 103.530), (58.395, 57.12, 57.375)
STRIDES = (8, 16, 32, 64, 128)
STAGE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
RESNETS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}
CONVNEXT_DEPTHS, CONVNEXT_DIMS = (3, 3, 9, 3), (96, 192, 384, 768)
SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW, SWIN_DIM = (2, 2, 18, 2), (4, 8, 16, 32), 7, 128
TRUNKS = (*RESNETS, "convnext_tiny", "swin_base")

# ---------------------------------------------------------------------------------------------- names and shapes


def weight_shapes(trunk, words, dim=512):
    """{name: shape} of a checkpoint; ``words`` and ``dim`` are of the text embeddings of its training."""
    shapes, channels = _trunk_shapes(trunk)
    shapes = {f"backbone.bottom_up.{name}": shape for name, shape in shapes.items()}
    for level, width in zip((3, 4, 5), channels):
        shapes |= _layer(f"backbone.fpn_lateral{level}", 256, width, 1, 1)
        shapes |= _layer(f"backbone.fpn_output{level}", 256, 256, 3, 3)
    shapes |= _layer("backbone.top_block.p6", 256, 256, 3, 3) | _layer("backbone.top_block.p7", 256, 256, 3, 3)
    head = "proposal_generator.centernet_head"
    for number in range(4):
        shapes |= _layer(f"{head}.bbox_tower.{3 * number}", 256, 256, 3, 3)
        shapes |= _norm(f"{head}.bbox_tower.{3 * number + 1}", 256)
    shapes |= _layer(f"{head}.bbox_pred", 4, 256, 3, 3) | _layer(f"{head}.agn_hm", 1, 256, 3, 3)
    shapes |= {f"{head}.scales.{level}.scale": (1,) for level in range(5)}
    for stage in range(3):
        box_head, predictor = f"roi_heads.box_head.{stage}", f"roi_heads.box_predictor.{stage}"
        shapes |= _layer(f"{box_head}.fc1", 1024, 256 * 49) | _layer(f"{box_head}.fc2", 1024, 1024)
        shapes |= _layer(f"{predictor}.cls_score.linear", dim, 1024)
        shapes |= {f"{predictor}.cls_score.zs_weight": (dim, words + 1)}
        shapes |= _layer(f"{predictor}.bbox_pred.0", 1024, 1024) | _layer(f"{predictor}.bbox_pred.2", 4, 1024)
    for number in range(4):
        shapes |= _layer(f"roi_heads.mask_head.mask_fcn{number + 1}", 256, 256, 3, 3)
    shapes |= {"roi_heads.mask_head.deconv.weight": (256, 256, 2, 2), "roi_heads.mask_head.deconv.bias": (256,)}
    return shapes | _layer("roi_heads.mask_head.predictor", 1, 256, 1, 1)


def _layer(name, *shape, bias=True):
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def _norm(name, width, statistics=False):
    kinds = ("weight", "bias", *(("running_mean", "running_var") if statistics else ()))
    return {f"{name}.{kind}": (width,) for kind in kinds}


def _trunk_shapes(trunk):
    if trunk in RESNETS:
        return _resnet_shapes(trunk)
    return _convnext_shapes() if trunk == "convnext_tiny" else _swin_shapes()


def _resnet_shapes(trunk):
    bottleneck = trunk == "resnet50"
    expansion = 4 if bottleneck else 1
    shapes, width = _layer("base.conv1", 64, 3, 7, 7, bias=False) | _norm("base.bn1", 64, True), 64
    for stage, depth in enumerate(RESNETS[trunk]):
        inner = 64 * 2**stage
        for number in range(depth):
            block = f"base.layer{stage + 1}.{number}"
            kernels = [(inner, width, 1), (inner, inner, 3), (4 * inner, inner, 1)] if bottleneck else [
                (inner, width, 3), (inner, inner, 3)
            ]  # fmt: skip
            for place, (out, given, side) in enumerate(kernels):
                shapes |= _layer(f"{block}.conv{place + 1}", out, given, side, side, bias=False)
                shapes |= _norm(f"{block}.bn{place + 1}", out, True)
            if width != expansion * inner or (number == 0 and stage > 0):
                shapes |= _layer(f"{block}.downsample.0", expansion * inner, width, 1, 1, bias=False)
                shapes |= _norm(f"{block}.downsample.1", expansion * inner, True)
            width = expansion * inner
    return shapes, [expansion * 64 * 2**stage for stage in (1, 2, 3)]


def _convnext_shapes():
    shapes = _layer("base.stem_0", 96, 3, 4, 4) | _norm("base.stem_1", 96)
    for stage, (depth, width) in enumerate(zip(CONVNEXT_DEPTHS, CONVNEXT_DIMS)):
        name = f"base.stages_{stage}"
        if stage:
            shapes |= _norm(f"{name}.downsample.0", width // 2) | _layer(
                f"{name}.downsample.1", width, width // 2, 2, 2
            )
        for number in range(depth):
            block = f"{name}.blocks.{number}"
            shapes |= {f"{block}.gamma": (width,)} | _layer(f"{block}.conv_dw", width, 1, 7, 7)
            shapes |= _norm(f"{block}.norm", width) | _layer(f"{block}.mlp.fc1", 4 * width, width)
            shapes |= _layer(f"{block}.mlp.fc2", width, 4 * width)
    return shapes, CONVNEXT_DIMS[1:]


def _swin_shapes():
    shapes = _layer("patch_embed.proj", SWIN_DIM, 3, 4, 4) | _norm("patch_embed.norm", SWIN_DIM)
    for stage, (depth, heads) in enumerate(zip(SWIN_DEPTHS, SWIN_HEADS)):
        width = SWIN_DIM * 2**stage
        for number in range(depth):
            block = f"layers.{stage}.blocks.{number}"
            shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
            shapes |= {f"{block}.attn.relative_position_bias_table": ((2 * SWIN_WINDOW - 1) ** 2, heads)}
            shapes |= {f"{block}.attn.relative_position_index": (SWIN_WINDOW**2, SWIN_WINDOW**2)}
            shapes |= _layer(f"{block}.attn.qkv", 3 * width, width) | _layer(f"{block}.attn.proj", width, width)
            shapes |= _layer(f"{block}.mlp.fc1", 4 * width, width) | _layer(f"{block}.mlp.fc2", width, 4 * width)
        if stage < 3:
            shapes |= _norm(f"layers.{stage}.downsample.norm", 4 * width)
            shapes |= _layer(f"layers.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        if stage:
            shapes |= _norm(f"norm{stage}", width)
    return shapes, [SWIN_DIM * 2**stage for stage in (1, 2, 3)]


# ------------------------------------------------------------------------------------------------------ trunks


def _sub(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _conv(x, weights, name, **options):
    return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), **options)


def _linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _batch_norm(x, weights, name):
    scale = weights[f"{name}.weight"] / (weights[f"{name}.running_var"] + 1e-5).sqrt()
    shift = weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def _resnet(x, weights, trunk):
    x = _batch_norm(_conv(x, weights, "conv1", stride=2, padding=3), weights, "bn1").relu()
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for stage, depth in enumerate(RESNETS[trunk]):
        for number in range(depth):
            block, stride = f"layer{stage + 1}.{number}", 2 if stage and not number else 1
            if trunk == "resnet50":  # the stride is in the 3 x 3 convolution
                y = _batch_norm(_conv(x, weights, f"{block}.conv1"), weights, f"{block}.bn1").relu()
                y = _conv(y, weights, f"{block}.conv2", stride=stride, padding=1)
                y = _batch_norm(y, weights, f"{block}.bn2").relu()
                y = _batch_norm(_conv(y, weights, f"{block}.conv3"), weights, f"{block}.bn3")
            else:
                y = _conv(x, weights, f"{block}.conv1", stride=stride, padding=1)
                y = _batch_norm(y, weights, f"{block}.bn1").relu()
                y = _batch_norm(_conv(y, weights, f"{block}.conv2", padding=1), weights, f"{block}.bn2")
            if f"{block}.downsample.0.weight" in weights:
                x = _batch_norm(
                    _conv(x, weights, f"{block}.downsample.0", stride=stride), weights, f"{block}.downsample.1"
                )
            x = (x + y).relu()
        maps.append(x)
    return maps[1:]


def _channel_norm(x, weights, name):
    """Layer norm over the channels of a map."""
    x = x.permute(0, 2, 3, 1)
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6).permute(0, 3, 1, 2)


def _convnext(x, weights):
    x, maps = _channel_norm(_conv(x, weights, "stem_0", stride=4), weights, "stem_1"), []
    for stage, depth in enumerate(CONVNEXT_DEPTHS):
        name = f"stages_{stage}"
        if stage:
            x = _conv(_channel_norm(x, weights, f"{name}.downsample.0"), weights, f"{name}.downsample.1", stride=2)
        for number in range(depth):
            block = f"{name}.blocks.{number}"
            y = _conv(x, weights, f"{block}.conv_dw", padding=3, groups=x.shape[1])
            y = _channel_norm(y, weights, f"{block}.norm").permute(0, 2, 3, 1)
            y = _linear(F.gelu(_linear(y, weights, f"{block}.mlp.fc1")), weights, f"{block}.mlp.fc2")
            x = x + weights[f"{block}.gamma"][:, None, None] * y.permute(0, 3, 1, 2)
        maps.append(x)
    return maps[1:]


def _pyramid(x, weights, trunk):
    own = _sub(weights, "backbone.bottom_up.")
    if trunk in RESNETS:
        maps = _resnet(x, _sub(own, "base."), trunk)
    elif trunk == "convnext_tiny":
        maps = _convnext(x, _sub(own, "base."))
    else:
        maps = list(swin_maps(own, x, SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW, (1, 2, 3)).values())
    weights, levels, above = _sub(weights, "backbone."), [], None
    for number, level in zip((5, 4, 3), reversed(maps)):
        merged = _conv(level, weights, f"fpn_lateral{number}")
        if above is not None:
            merged = merged + above.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        above = merged
        levels.insert(0, _conv(merged, weights, f"fpn_output{number}", padding=1))
    p6 = _conv(levels[-1], weights, "top_block.p6", stride=2, padding=1)
    return [*levels, p6, _conv(p6.relu(), weights, "top_block.p7", stride=2, padding=1)]


# --------------------------------------------------------------------------------------------------- detection


def network_input(jpeg, short_side, longest=1333):
    """(Tensor [1, 3, H, W], (height, width) of the resized image, (height, width) of the original)."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    width, height = image.size
    scale = short_side / min(width, height)
    scale = min(scale, longest / max(width, height))
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    resized = torch.from_numpy(np.array(image.resize(size[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1).float()
    pixels = (resized - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return F.pad(pixels, (0, -size[1] % 32, 0, -size[0] % 32))[None], size, (height, width)


def proposals(levels, weights):
    """(boxes [R, 4], objectness [R]), best first."""
    weights, boxes, scores = _sub(weights, "proposal_generator.centernet_head."), [], []
    for number, (level, stride) in enumerate(zip(levels, STRIDES)):
        for place in range(4):
            level = _conv(level, weights, f"bbox_tower.{3 * place}", padding=1)
            norm = f"bbox_tower.{3 * place + 1}"
            level = F.group_norm(level, 32, weights[f"{norm}.weight"], weights[f"{norm}.bias"]).relu()
        heat = _conv(level, weights, "agn_hm", padding=1)[0, 0].sigmoid()
        far = _conv(level, weights, "bbox_pred", padding=1)[0] * weights[f"scales.{number}.scale"]
        far = stride * far.relu().permute(1, 2, 0).flatten(0, 1)
        y, x = torch.meshgrid(*(torch.arange(side) for side in heat.shape), indexing="ij")
        x, y, heat = stride * (x.flatten() + 0.5), stride * (y.flatten() + 0.5), heat.flatten()
        order = heat.argsort(descending=True)[:1000]
        order = order[heat[order] > 1e-4]
        left, top = x[order] - far[order, 0], y[order] - far[order, 1]
        right, bottom = x[order] + far[order, 2], y[order] + far[order, 3]
        boxes.append(torch.stack([left, top, right.maximum(left + 0.01), bottom.maximum(top + 0.01)], dim=1))
        scores.append(heat[order].sqrt())
    boxes, scores = torch.cat(boxes), torch.cat(scores)
    keep = nms(boxes, scores, 0.9)
    keep = keep[scores[keep] >= scores[keep][:256][-1]]
    return boxes[keep], scores[keep]


def _pooled(levels, boxes, side):
    """RoIAlign [R, 256, side, side] on P3 to P5: a box of 224 pixels is on P4."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    chosen = (4 + torch.log2(sides / 224 + 1e-8)).floor().clamp(3, 5)
    pooled = torch.zeros(len(boxes), 256, side, side)
    for number, (level, stride) in enumerate(zip(levels[:3], STRIDES)):
        rows = torch.nonzero(chosen == 3 + number).flatten()
        pooled[rows] = roi_align(level, [boxes[rows]], side, 1 / stride, sampling_ratio=0, aligned=True)
    return pooled


def _clipped(boxes, size):
    return torch.stack([boxes[:, i].clamp(0, size[1 - i % 2]) for i in range(4)], dim=1)


def _refined(boxes, deltas, weights):
    dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(1)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = boxes[:, 0] + 0.5 * width + dx * width, boxes[:, 1] + 0.5 * height + dy * height
    limit = math.log(1000 / 16)
    width, height = width * dw.clamp(max=limit).exp(), height * dh.clamp(max=limit).exp()
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)


def cascade(levels, weights, boxes, objectness, text, size):
    """(boxes [R, 4], scores [R, K]): the score is the root of mean probability times objectness."""
    probs = 0
    for stage, box_weights in enumerate(STAGE_WEIGHTS):
        if stage:
            boxes = _clipped(boxes, size)
        own = _sub(weights, "roi_heads.")
        x = _pooled(levels, boxes, 7).flatten(1)
        x = _linear(_linear(x, own, f"box_head.{stage}.fc1").relu(), own, f"box_head.{stage}.fc2").relu()
        region = F.normalize(_linear(x, own, f"box_predictor.{stage}.cls_score.linear"), dim=1)
        probs = probs + (50 * region @ F.normalize(text, dim=1).T).sigmoid() / 3
        hidden = _linear(x, own, f"box_predictor.{stage}.bbox_pred.0").relu()
        boxes = _refined(boxes, _linear(hidden, own, f"box_predictor.{stage}.bbox_pred.2"), box_weights)
    return _clipped(boxes, size), (probs * objectness[:, None]).sqrt()


def _masks(levels, weights, boxes):
    own, x = _sub(weights, "roi_heads.mask_head."), _pooled(levels, boxes, 14)
    for number in range(4):
        x = _conv(x, own, f"mask_fcn{number + 1}", padding=1).relu()
    x = F.conv_transpose2d(x, own["deconv.weight"], own["deconv.bias"], stride=2).relu()
    return _conv(x, own, "predictor").sigmoid()


def _pasted(masks, boxes, size):
    """Masks [R, 1, 28, 28] in boxes of an image: bool Tensor [R, height, width]."""
    pasted = []
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        x = (torch.arange(size[1]) + 0.5 - left) / (right - left) * 2 - 1
        y = (torch.arange(size[0]) + 0.5 - top) / (bottom - top) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
        pasted.append(F.grid_sample(mask[None], grid[None], align_corners=False)[0, 0] >= 0.5)
    return torch.stack(pasted)


@torch.no_grad()
def detect(jpeg, weights, trunk, text, short_side, score_threshold=0.02, topk=300):
    """Detections of an image, best first.

    Args:
        jpeg: bytes.
        weights: of a checkpoint, by name.
        trunk: one of TRUNKS.
        text: embeddings of the words, Tensor [K, D].
        short_side: of the network's input.

    Returns:
        dict of boxes [M, 4] in pixels of the image, scores [M], classes [M] and masks, bool [M, height, width].
    """
    pixels, size, original = network_input(jpeg, short_side)
    levels = _pyramid(pixels, weights, trunk)
    boxes, scores = cascade(levels, weights, *proposals(levels, weights), text, size)
    regions, classes = torch.nonzero(scores > score_threshold, as_tuple=True)
    values, boxes = scores[regions, classes], boxes[regions]
    order = values.argsort(descending=True, stable=True)
    # NMS within each class: boxes of different classes are moved apart.
    keep = order[nms(boxes[order].double() + 1e4 * classes[order, None], values[order].double(), 0.5)][:topk]
    boxes, values, classes = boxes[keep], values[keep], classes[keep]
    masks = _masks(levels, weights, boxes)
    factors = torch.tensor([original[1] / size[1], original[0] / size[0]] * 2)
    boxes = _clipped(boxes * factors, original)
    seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, values, classes = boxes[seen], values[seen], classes[seen]
    return {"boxes": boxes, "scores": values, "classes": classes, "masks": _pasted(masks[seen], boxes, original)}
