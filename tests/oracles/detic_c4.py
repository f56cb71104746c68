"""Detic's detector of OV-COCO (R50-C4) from its published equations, in plain torch, with the names of its checkpoints.

It imports nothing of ovdet2 and nothing of Detectron2. RoIAlign and NMS are torchvision's. From JPEG bytes to boxes,
scores and classes of one image.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

MEAN = 103.530, 116.280, 123.675  # of blue, green, red
STAGES = {"res2": (3, 64), "res3": (4, 128), "res4": (6, 256), "res5": (3, 512)}  # blocks, inner channels
SIZES, RATIOS, STRIDE = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0), 16


def weight_shapes(words, dim=512):
    """{name: shape} of a checkpoint; ``words`` and ``dim`` are of the text embeddings of its training."""
    shapes, width = _conv_shapes("backbone.stem.conv1", 64, 3, 7), 64
    for stage, (depth, inner) in STAGES.items():
        prefix = "roi_heads.res5" if stage == "res5" else f"backbone.{stage}"
        for number in range(depth):
            block = f"{prefix}.{number}"
            if number == 0:
                shapes |= _conv_shapes(f"{block}.shortcut", 4 * inner, width, 1)
            shapes |= _conv_shapes(f"{block}.conv1", inner, width, 1) | _conv_shapes(f"{block}.conv2", inner, inner, 3)
            shapes |= _conv_shapes(f"{block}.conv3", 4 * inner, inner, 1)
            width = 4 * inner
    rpn, predictor = "proposal_generator.rpn_head", "roi_heads.box_predictor"
    shapes |= {f"{rpn}.conv.weight": (1024, 1024, 3, 3), f"{rpn}.conv.bias": (1024,)}
    shapes |= {f"{rpn}.objectness_logits.weight": (15, 1024, 1, 1), f"{rpn}.objectness_logits.bias": (15,)}
    shapes |= {f"{rpn}.anchor_deltas.weight": (60, 1024, 1, 1), f"{rpn}.anchor_deltas.bias": (60,)}
    shapes |= {f"{predictor}.cls_score.linear.weight": (dim, 2048), f"{predictor}.cls_score.linear.bias": (dim,)}
    shapes |= {f"{predictor}.cls_score.zs_weight": (dim, words + 1), f"{predictor}.freq_weight": (words,)}
    for number, out in ((0, 2048), (2, 4)):
        shapes |= {
            f"{predictor}.bbox_pred.{number}.weight": (out, 2048),
            f"{predictor}.bbox_pred.{number}.bias": (out,),
        }
    return shapes


def _conv_shapes(name, out, given, side):
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.weight": (out, given, side, side)} | {f"{name}.norm.{kind}": (out,) for kind in kinds}


def _conv(x, weights, name, stride=1, padding=0):
    """A convolution without bias and a batch norm with fixed statistics."""
    scale = weights[f"{name}.norm.weight"] / (weights[f"{name}.norm.running_var"] + 1e-5).sqrt()
    shift = weights[f"{name}.norm.bias"] - weights[f"{name}.norm.running_mean"] * scale
    x = F.conv2d(x, weights[f"{name}.weight"], None, stride, padding)
    return x * scale[:, None, None] + shift[:, None, None]


def _stage(x, weights, prefix, depth, stride):
    """Bottleneck blocks; the stride is in the first 1 x 1 convolution."""
    for number in range(depth):
        block, step = f"{prefix}.{number}", stride if number == 0 else 1
        y = _conv(x, weights, f"{block}.conv1", step).relu()
        y = _conv(_conv(y, weights, f"{block}.conv2", padding=1).relu(), weights, f"{block}.conv3")
        x = (y + (_conv(x, weights, f"{block}.shortcut", step) if number == 0 else x)).relu()
    return x


def _linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _anchors(height, width):
    """[height * width * 15, 4], cell by cell; in a cell by size, then by ratio of height to width."""
    cell = []
    for size in SIZES:
        for ratio in RATIOS:
            wide = math.sqrt(size**2 / ratio)
            cell.append([-wide / 2, -ratio * wide / 2, wide / 2, ratio * wide / 2])
    y, x = torch.meshgrid(STRIDE * torch.arange(height), STRIDE * torch.arange(width), indexing="ij")
    return (torch.stack([x, y, x, y], dim=-1)[:, :, None] + torch.tensor(cell)).view(-1, 4)


def _refined(boxes, deltas, weights=(1.0, 1.0, 1.0, 1.0)):
    dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(1)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = boxes[:, 0] + 0.5 * width + dx * width, boxes[:, 1] + 0.5 * height + dy * height
    limit = math.log(1000 / 16)
    width, height = width * dw.clamp(max=limit).exp(), height * dh.clamp(max=limit).exp()
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)


def _clipped(boxes, size):
    return torch.stack([boxes[:, i].clamp(0, size[1 - i % 2]) for i in range(4)], dim=1)


def _has_area(boxes):
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def proposals(features, weights, size, topk):
    """Boxes [R, 4] of the RPN, best first."""
    name = "proposal_generator.rpn_head"
    hidden = F.conv2d(features, weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"], padding=1).relu()
    logits, deltas = (
        F.conv2d(hidden, weights[f"{name}.{kind}.weight"], weights[f"{name}.{kind}.bias"])[0].permute(1, 2, 0)
        for kind in ("objectness_logits", "anchor_deltas")
    )
    order = logits.flatten().argsort(descending=True)[:6000]
    boxes = _refined(_anchors(*features.shape[-2:]), deltas.reshape(-1, 4))[order]
    boxes, logits = _clipped(boxes, size), logits.flatten()[order]
    boxes, logits = boxes[_has_area(boxes)], logits[_has_area(boxes)]
    return boxes[nms(boxes, logits, 0.7)[:topk]]


@torch.no_grad()
def detect(jpeg, weights, text, short_side, num_proposals=1000, score_threshold=0.05, topk=100):
    """Detections of an image, best first: dict of boxes [M, 4] in pixels of the image, scores [M] and classes [M].

    Args:
        jpeg: bytes.
        weights: of a checkpoint, by name.
        text: embeddings of the words, Tensor [K, D].
        short_side: of the network's input.
    """
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = min(short_side / min(image.size), 1333 / max(image.size))
    width, height = (int(side * scale + 0.5) for side in image.size)
    resized = np.array(image.resize((width, height), Image.Resampling.BILINEAR))[:, :, ::-1].copy()
    x = (torch.from_numpy(resized).permute(2, 0, 1).float() - torch.tensor(MEAN)[:, None, None])[None]
    x = F.max_pool2d(_conv(x, weights, "backbone.stem.conv1", 2, 3).relu(), 3, 2, 1)
    for stage in ("res2", "res3", "res4"):
        x = _stage(x, weights, f"backbone.{stage}", STAGES[stage][0], 1 if stage == "res2" else 2)
    boxes = proposals(x, weights, (height, width), num_proposals)
    pooled = roi_align(x, [boxes], 14, 1 / STRIDE, sampling_ratio=0, aligned=True)
    regions = _stage(pooled, weights, "roi_heads.res5", STAGES["res5"][0], 2).mean(dim=(2, 3))
    name = "roi_heads.box_predictor"
    embedded = F.normalize(_linear(regions, weights, f"{name}.cls_score.linear"), dim=1)
    scores = (50 * embedded @ F.normalize(text, dim=1).T).sigmoid()
    hidden = _linear(regions, weights, f"{name}.bbox_pred.0").relu()
    boxes = _refined(boxes, _linear(hidden, weights, f"{name}.bbox_pred.2"), (10.0, 10.0, 5.0, 5.0))
    boxes = _clipped(boxes, (height, width))
    rows, classes = torch.nonzero(scores > score_threshold, as_tuple=True)
    values, boxes = scores[rows, classes], boxes[rows]
    order = values.argsort(descending=True, stable=True)
    # NMS within each class: boxes of different classes are moved apart.
    keep = order[nms(boxes[order].double() + 1e4 * classes[order, None], values[order].double(), 0.5)][:topk]
    factors = torch.tensor([image.size[0] / width, image.size[1] / height] * 2)
    boxes, values, classes = _clipped(boxes[keep] * factors, image.size[::-1]), values[keep], classes[keep]
    seen = _has_area(boxes)
    return {"boxes": boxes[seen], "scores": values[seen], "classes": classes[seen]}
