"""Detic's Deformable DETR (two stages with box refinement, Zhu et al., ICLR 2021) from its equations, in plain torch.

It imports nothing of ovdet2 and nothing of Detectron2. Names of weights are those of Detic's files. From JPEG bytes to
boxes, scores and classes of one image, which is not padded. Deformable attention is an explicit sum over the four pixels
around each point.

Shapes: S tokens of L levels, N queries, C channels, H heads, P points, K classes.
"""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

MEAN, STD = (123.675, 116.280, 103.530), (58.395, 57.12, 57.375)
STAGES = {"res2": (3, 64), "res3": (4, 128), "res4": (6, 256), "res5": (3, 512)}  # blocks, inner channels
DIM, FFN, HEADS, LEVELS, POINTS, LAYERS, QUERIES = 256, 1024, 8, 4, 4, 6, 300

# ---------------------------------------------------------------------------------------------- names and shapes


def weight_shapes(classes):
    """{name: shape} of a checkpoint, without the heads' second names: see :func:`with_second_names`."""
    shapes, width = _conv_shapes("backbone.0.backbone.stem.conv1", 64, 3, 7), 64
    for stage, (depth, inner) in STAGES.items():
        for number in range(depth):
            block = f"backbone.0.backbone.{stage}.{number}"
            if number == 0:
                shapes |= _conv_shapes(f"{block}.shortcut", 4 * inner, width, 1)
            shapes |= _conv_shapes(f"{block}.conv1", inner, width, 1) | _conv_shapes(f"{block}.conv2", inner, inner, 3)
            shapes |= _conv_shapes(f"{block}.conv3", 4 * inner, inner, 1)
            width = 4 * inner
    for level, (given, side) in enumerate(((512, 1), (1024, 1), (2048, 1), (2048, 3))):
        shapes |= {f"input_proj.{level}.0.weight": (DIM, given, side, side), f"input_proj.{level}.0.bias": (DIM,)}
        shapes |= _norm_shapes(f"input_proj.{level}.1")
    shapes |= {"transformer.level_embed": (LEVELS, DIM)}
    for number in range(LAYERS):
        layer = f"transformer.encoder.layers.{number}"
        shapes |= _attention_shapes(f"{layer}.self_attn") | _feed_forward_shapes(layer)
        shapes |= _norm_shapes(f"{layer}.norm1") | _norm_shapes(f"{layer}.norm2")
        layer = f"transformer.decoder.layers.{number}"
        shapes |= _attention_shapes(f"{layer}.cross_attn") | _feed_forward_shapes(layer)
        shapes |= {f"{layer}.self_attn.in_proj_weight": (3 * DIM, DIM), f"{layer}.self_attn.in_proj_bias": (3 * DIM,)}
        shapes |= _linear_shapes(f"{layer}.self_attn.out_proj", DIM, DIM)
        shapes |= _norm_shapes(f"{layer}.norm1") | _norm_shapes(f"{layer}.norm2") | _norm_shapes(f"{layer}.norm3")
    shapes |= _linear_shapes("transformer.enc_output", DIM, DIM) | _norm_shapes("transformer.enc_output_norm")
    shapes |= _linear_shapes("transformer.pos_trans", 2 * DIM, 2 * DIM)
    shapes |= _norm_shapes("transformer.pos_trans_norm", 2 * DIM)
    for number in range(LAYERS + 1):  # the last ones are those of the proposals
        shapes |= _linear_shapes(f"class_embed.{number}", classes, DIM)
        for place, out in enumerate((DIM, DIM, 4)):
            shapes |= _linear_shapes(f"bbox_embed.{number}.layers.{place}", out, DIM)
    return {f"detr.{name}": shape for name, shape in shapes.items()} | {"criterion.fed_loss_weight": (classes,)}


def with_second_names(weights):
    """The weights of a file: the heads also belong to the decoder, so they have two names."""
    heads = ("detr.class_embed.", "detr.bbox_embed.")
    second = {name: value for name, value in weights.items() if name.startswith(heads)}
    return weights | {f"detr.transformer.decoder.{name.removeprefix('detr.')}": second[name] for name in second}


def _conv_shapes(name, out, given, side):
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.weight": (out, given, side, side)} | {f"{name}.norm.{kind}": (out,) for kind in kinds}


def _norm_shapes(name, width=DIM):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear_shapes(name, out, given):
    return {f"{name}.weight": (out, given), f"{name}.bias": (out,)}


def _attention_shapes(name):
    shapes = _linear_shapes(f"{name}.sampling_offsets", 2 * HEADS * LEVELS * POINTS, DIM)
    shapes |= _linear_shapes(f"{name}.attention_weights", HEADS * LEVELS * POINTS, DIM)
    return shapes | _linear_shapes(f"{name}.value_proj", DIM, DIM) | _linear_shapes(f"{name}.output_proj", DIM, DIM)


def _feed_forward_shapes(layer):
    return _linear_shapes(f"{layer}.linear1", FFN, DIM) | _linear_shapes(f"{layer}.linear2", DIM, FFN)


# ------------------------------------------------------------------------------------------------ trunk and levels


def _conv(x, weights, name, stride=1, padding=0):
    """A convolution without bias and a batch norm with fixed statistics."""
    scale = weights[f"{name}.norm.weight"] / (weights[f"{name}.norm.running_var"] + 1e-5).sqrt()
    shift = weights[f"{name}.norm.bias"] - weights[f"{name}.norm.running_mean"] * scale
    x = F.conv2d(x, weights[f"{name}.weight"], None, stride, padding)
    return x * scale[:, None, None] + shift[:, None, None]


def _linear(x, weights, name):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(x, weights, name):
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])


def _levels(x, weights):
    """Image [1, 3, h, w] -> the L maps [C, height, width]; strides 8, 16, 32 and 64."""
    name = "backbone.0.backbone"
    x, maps = F.max_pool2d(_conv(x, weights, f"{name}.stem.conv1", 2, 3).relu(), 3, 2, 1), []
    for stage, (depth, _) in STAGES.items():
        for number in range(depth):
            block, stride = f"{name}.{stage}.{number}", 2 if stage != "res2" and number == 0 else 1
            y = _conv(x, weights, f"{block}.conv1").relu()
            y = _conv(y, weights, f"{block}.conv2", stride, 1).relu()  # the stride is in the 3 x 3 convolution
            y = _conv(y, weights, f"{block}.conv3")
            x = (y + (_conv(x, weights, f"{block}.shortcut", stride) if number == 0 else x)).relu()
        maps.append(x)
    levels = []
    for level, given in enumerate([*maps[1:], maps[-1]]):
        options = {"stride": 2, "padding": 1} if level == 3 else {}
        projected = F.conv2d(given, *_pair(weights, f"input_proj.{level}.0"), **options)
        levels.append(F.group_norm(projected, 32, *_pair(weights, f"input_proj.{level}.1"))[0])
    return levels


def _pair(weights, name):
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


# -------------------------------------------------------------------------------------------------- transformer


def _sines(angles, channels):
    """[...] in radians -> [..., channels]: sine and cosine in turn, at wavelengths that grow to 10000 times the first."""
    steps = torch.arange(0, channels, 2, dtype=angles.dtype)
    angles = angles[..., None] / 10000 ** (steps / channels)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def _positions(height, width):
    """[height * width, C]: first half of y, second half of x; cell i of n is at (i + 0.5) / n of a full turn."""
    y, x = (2 * math.pi * (torch.arange(side) + 0.5) / (side + 1e-6) for side in (height, width))
    y, x = _sines(y, DIM // 2), _sines(x, DIM // 2)
    return torch.cat([y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)], dim=-1).flatten(0, 1)


def _centres(shapes):
    """Centres of the cells of all levels, [S, 2] of (x, y) in (0, 1)."""
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(centres)


def _bilinear(values, points):
    """Values [height, width, H, c] at points [Q, H, P, 2] of (x, y), the map being [0, 1]: [Q, H, P, c]; 0 outside."""
    height, width = values.shape[:2]
    x, y = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = x.floor(), y.floor()
    head, total = torch.arange(values.shape[2])[:, None], 0
    for column, row in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        share = (1 - (x - column).abs()) * (1 - (y - row).abs())
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        corner = values[row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long(), head]
        total = total + (share * inside)[..., None] * corner
    return total


def _attention(queries, references, tokens, shapes, weights, name):
    """Deformable attention (Eq. 3) of queries [Q, C] with references [Q, 2] or [Q, 4] to tokens [S, C]."""
    count = len(queries)
    offsets = _linear(queries, weights, f"{name}.sampling_offsets").view(count, HEADS, LEVELS, POINTS, 2)
    shares = _linear(queries, weights, f"{name}.attention_weights").view(count, HEADS, LEVELS * POINTS).softmax(-1)
    shares = shares.view(count, HEADS, LEVELS, POINTS, 1)
    values = _linear(tokens, weights, f"{name}.value_proj").view(len(tokens), HEADS, -1)
    total, first = 0, 0
    for level, (height, width) in enumerate(shapes):
        if references.shape[1] == 2:  # offsets are in pixels of the level
            unit = torch.tensor([1 / width, 1 / height])
        else:  # and of a box, in its half sides by the number of points
            unit = references[:, None, None, 2:] / (2 * POINTS)
        points = references[:, None, None, :2] + offsets[:, :, level] * unit
        grid = values[first : first + height * width].view(height, width, HEADS, -1)
        total = total + (shares[:, :, level] * _bilinear(grid, points)).sum(dim=2)
        first += height * width
    return _linear(total.flatten(1), weights, f"{name}.output_proj")


def _feed_forward(x, weights, layer, norm):
    return _norm(
        x + _linear(_linear(x, weights, f"{layer}.linear1").relu(), weights, f"{layer}.linear2"), weights, norm
    )


def _encoded(levels, weights):
    """(tokens [S, C] of the encoder, (height, width) of each level)."""
    shapes = [tuple(level.shape[1:]) for level in levels]
    tokens = torch.cat([level.flatten(1).T for level in levels])
    embed = weights["transformer.level_embed"]
    positions = torch.cat([_positions(*shape) + embed[level] for level, shape in enumerate(shapes)])
    centres = _centres(shapes)
    for number in range(LAYERS):
        layer = f"transformer.encoder.layers.{number}"
        attended = _attention(tokens + positions, centres, tokens, shapes, weights, f"{layer}.self_attn")
        tokens = _norm(tokens + attended, weights, f"{layer}.norm1")
        tokens = _feed_forward(tokens, weights, layer, f"{layer}.norm2")
    return tokens, shapes


def _box_logits(hidden, weights, number):
    for place in range(2):
        hidden = _linear(hidden, weights, f"bbox_embed.{number}.layers.{place}").relu()
    return _linear(hidden, weights, f"bbox_embed.{number}.layers.2")


def _proposals(tokens, shapes, weights):
    """(boxes [N, 4], positions [N, C], contents [N, C]) of the tokens with the highest first class logit.

    Every token proposes a box around its cell. Those within a hundredth of the image's border are no proposals: their
    features are zero and their boxes the full image, and they may still be among the best, as published.
    """
    sides = torch.cat(
        [torch.full((height * width, 2), 0.05 * 2**level) for level, (height, width) in enumerate(shapes)]
    )
    boxes = torch.cat([_centres(shapes), sides], dim=1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(dim=1, keepdim=True)
    hidden = _norm(_linear(tokens * valid, weights, "transformer.enc_output"), weights, "transformer.enc_output_norm")
    logits = _box_logits(hidden, weights, LAYERS) + torch.where(valid, torch.log(boxes / (1 - boxes)), math.inf)
    best = _linear(hidden, weights, f"class_embed.{LAYERS}")[:, 0].argsort(descending=True)[:QUERIES]
    boxes = logits[best].sigmoid()
    embedded = _linear(_sines(2 * math.pi * boxes, DIM // 2).flatten(1), weights, "transformer.pos_trans")
    positions, contents = _norm(embedded, weights, "transformer.pos_trans_norm").chunk(2, dim=1)
    return boxes, positions, contents


def _self_attention(x, positions, weights, name):
    """Attention among N queries [N, C]: H heads of C / H channels; positions are no part of the values."""
    matrix, bias = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    parts = [F.linear(given, matrix[DIM * part : DIM * (part + 1)], bias[DIM * part : DIM * (part + 1)])
             for part, given in enumerate((x + positions, x + positions, x))]  # fmt: skip
    queries, keys, values = (part.view(len(x), HEADS, -1).transpose(0, 1) for part in parts)
    shares = (queries @ keys.transpose(1, 2) / math.sqrt(DIM // HEADS)).softmax(-1)
    return _linear((shares @ values).transpose(0, 1).flatten(1), weights, f"{name}.out_proj")


def _decoded(tokens, shapes, weights):
    """(class logits [N, K], boxes [N, 4] of (cx, cy, w, h) in (0, 1)) of the last layer."""
    boxes, positions, x = _proposals(tokens, shapes, weights)
    for number in range(LAYERS):
        layer = f"transformer.decoder.layers.{number}"
        x = _norm(x + _self_attention(x, positions, weights, f"{layer}.self_attn"), weights, f"{layer}.norm2")
        attended = _attention(x + positions, boxes, tokens, shapes, weights, f"{layer}.cross_attn")
        x = _feed_forward(_norm(x + attended, weights, f"{layer}.norm1"), weights, layer, f"{layer}.norm3")
        logits = torch.log(boxes.clamp(min=1e-5) / (1 - boxes).clamp(min=1e-5))
        boxes = (logits + _box_logits(x, weights, number)).sigmoid()
    return _linear(x, weights, f"class_embed.{LAYERS - 1}"), boxes


# ---------------------------------------------------------------------------------------------------- detection


def network_input(jpeg, short_side, longest=1333):
    """(Tensor [1, 3, h, w], (height, width) of the original): RGB, resized bilinearly by PIL, normalised, not padded."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = min(short_side / min(image.size), longest / max(image.size))
    width, height = (int(side * scale + 0.5) for side in image.size)
    resized = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BILINEAR))).float()
    return ((resized - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None], image.size[::-1]


@torch.no_grad()
def detect(jpeg, weights, short_side, topk=300):
    """Detections of an image, best first: dict of boxes [M, 4] in pixels of the image, scores [M] and classes [M].

    All pairs of a query and a class compete. Boxes may end beyond the image, as published.

    Args:
        jpeg: bytes.
        weights: of a checkpoint, by name.
        short_side: of the network's input.
        topk: M.
    """
    weights = {name.removeprefix("detr."): value for name, value in weights.items()}
    pixels, (height, width) = network_input(jpeg, short_side)
    logits, boxes = _decoded(*_encoded(_levels(pixels, weights), weights), weights)
    order = logits.flatten().argsort(descending=True, stable=True)[:topk]
    queries, classes = order // logits.shape[1], order % logits.shape[1]
    x, y, wide, high = boxes[queries].unbind(1)
    corners = torch.stack([x - wide / 2, y - high / 2, x + wide / 2, y + high / 2], dim=1)
    scores = logits.flatten()[order].sigmoid()
    return {"boxes": corners * torch.tensor([width, height, width, height]), "scores": scores, "classes": classes}
