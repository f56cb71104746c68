"""Convert published Deformable DETR weights to the names of :class:`~ovdet2.modeling.detr.model.DeformableDETR`.

Two naming schemes are read: the official repository's, and that of ``transformers``, before and after its version 5.
H-Deformable-DETR has the official names; its queries have a learned content, and its encoding of boxes has 2 C channels,
of which it uses the first half. Both have a ResNet trunk with torchvision's names. Detic's Deformable DETR has the official
names below "detr.", and a trunk with Detectron2's names. Duplicated weights become one module here. Query, key and value projections become one matrix.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from torch import Tensor

from ovdet2.errors import DataError
from ovdet2.io.weights import known_kind
from ovdet2.modeling.detr.heads import ClosedSetBranch
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.transformer import DeformableTransformer

_DEPTHS = {6: 50, 23: 101}  # ResNet depth by the number of blocks of the third stage
_SHOWN = 8  # names in an error message
_DETIC = "detr."  # prefix of the names of Detic's files
_DETREX = "neck.convs."  # only in the names of detrex's files
_CLASS_LAYER = re.compile(r"class_embed\.\d+\.(weight|bias)$")

_TRUNK = r"(?:backbone\.0\.body|model\.backbone(?:\.conv_encoder)?\.model)\."
_QUERIES = "transformer.query_maker."
# The first rule that matches the full name gives the new name. None: drop it (no weight, or a duplicate).
_RULES = [
    (rf"{_TRUNK}(?:fc\..*|.*num_batches_tracked)", None),
    (r"(?:.*\.)?total_(?:ops|params)", None),  # counters of the profiler thop
    (r"criterion\.fed_loss_weight", None),  # image counts of Detic's loss
    (r"backbone\.(?:0\.backbone\.)?((?:stem|res\d)\..*)", r"backbone.\1"),  # Detic, detrex
    (rf"{_TRUNK}conv1\.(.*)", r"backbone.stem.conv1.\1"),
    (rf"{_TRUNK}bn1\.(.*)", r"backbone.stem.conv1.norm.\1"),
    (rf"{_TRUNK}layer(\d)\.(\d+)\.conv(\d)\.(.*)", r"backbone.layer\1.\2.conv\3.\4"),
    (rf"{_TRUNK}layer(\d)\.(\d+)\.bn(\d)\.(.*)", r"backbone.layer\1.\2.conv\3.norm.\4"),
    (rf"{_TRUNK}layer(\d)\.(\d+)\.downsample\.0\.(.*)", r"backbone.layer\1.\2.shortcut.\3"),
    (rf"{_TRUNK}layer(\d)\.(\d+)\.downsample\.1\.(.*)", r"backbone.layer\1.\2.shortcut.norm.\3"),
    (r"(?:model\.)?input_proj\.(.*)", r"neck.levels.\1"),
    # detrex; "extra_convs" follow those of the three maps of the trunk.
    (r"neck\.convs\.(\d)\.conv\.(.*)", r"neck.levels.\1.0.\2"),
    (r"neck\.convs\.(\d)\.norm\.(.*)", r"neck.levels.\1.1.\2"),
    (r"neck\.extra_convs\.0\.conv\.(.*)", r"neck.levels.3.0.\1"),
    (r"neck\.extra_convs\.0\.norm\.(.*)", r"neck.levels.3.1.\1"),
    (r"(transformer\.(?:en|de)coder\.layers\.\d+)\.attentions\.0\.(?:attn\.)?(.*)", r"\1.self_attn.\2"),
    (r"(transformer\.decoder\.layers\.\d+)\.attentions\.1\.(.*)", r"\1.cross_attn.\2"),
    (r"query_embedding\.weight", "query_embed"),
    (r"(?:model|transformer)\.level_embeds?", "transformer.level_embed"),
    (r"(?:model|transformer)\.reference_points\.(.*)", rf"{_QUERIES}reference.\1"),
    (r"(?:model|transformer)\.enc_output\.(.*)", rf"{_QUERIES}project.\1"),
    (r"(?:model|transformer)\.enc_output_norm\.(.*)", rf"{_QUERIES}norm.\1"),
    (r"(?:model|transformer)\.pos_trans\.(.*)", rf"{_QUERIES}box_embed.\1"),
    (r"(?:model|transformer)\.pos_trans_norm\.(.*)", rf"{_QUERIES}box_norm.\1"),
    (r"(?:query_embed|model\.query_position_embeddings)\.weight", "query_embed"),
    (r"(?:(?:model|transformer)\.decoder\.)?(class|bbox)_embed\.(.*)", r"\1_embed.\2"),
    (r"(?:model|transformer)\.((?:en|de)coder\.layers\.\d+\.)(.*)", r"transformer.\1\2"),
]
# Names within a transformer layer, by layer kind and naming scheme.
_OFFICIAL = {
    "encoder": {"norm1": "norm", "norm2": "ffn.norm", "linear1": "ffn.linear1", "linear2": "ffn.linear2"},
    "decoder": {
        "norm1": "cross_norm",
        "norm2": "self_norm",
        "norm3": "ffn.norm",
        "linear1": "ffn.linear1",
        "linear2": "ffn.linear2",
    },
}
_FFN = {"ffns.0.layers.0.0": "ffn.linear1", "ffns.0.layers.1": "ffn.linear2"}
_DETREX_NAMES = {
    "encoder": {"norms.0": "norm", "norms.1": "ffn.norm", **_FFN},
    "decoder": {"norms.0": "self_norm", "norms.1": "cross_norm", "norms.2": "ffn.norm", **_FFN},
}
_MLP = {"fc1": "ffn.linear1", "fc2": "ffn.linear2", "mlp.fc1": "ffn.linear1", "mlp.fc2": "ffn.linear2"}
_TRANSFORMERS = {
    "encoder": {"self_attn_layer_norm": "norm", "final_layer_norm": "ffn.norm", **_MLP},
    "decoder": {
        "self_attn_layer_norm": "self_norm",
        "encoder_attn_layer_norm": "cross_norm",
        "final_layer_norm": "ffn.norm",
        "encoder_attn": "cross_attn",
        "self_attn.o_proj": "self_attn.out_proj",
        **_MLP,
    },
}


def import_weights(
    weights: Mapping[str, Any], class_rows: Sequence[int] | None = None, num_queries: int | None = None
) -> tuple[dict[str, Tensor], str]:
    """Rename the weights of a published Deformable DETR.

    Args:
        weights: dict of name to Tensor, official, of ``transformers``, of Detic or of detrex.
        class_rows: rows of the class layers to keep, in this order: the category ids of the classes, since the
            published models have a row per COCO id; of files with a row per class their ranks, see
            :func:`rows_of_classes`. None: all. An empty list: no class layer, for a text classifier.
        num_queries: keep only the first learned queries: those of H-Deformable-DETR after the first 300 are matched
            one-to-many and take part in training only. None: all.

    Returns:
        (weights, variant): dict of name to Tensor, and one of :data:`~ovdet2.modeling.detr.transformer.VARIANTS`.
        Weights of "plus_plus" need MODEL.DETR.WIDE_POSITION.

    Raises:
        DataError: names are unknown or missing, duplicates differ, shapes do not fit together, or there are fewer than
            ``num_queries`` learned queries.
    """
    weights = {name: torch.as_tensor(value) for name, value in weights.items()}
    renamed, unknown = _rename(weights)
    if unknown:
        kind = known_kind(weights)
        looks = "" if kind is None else f", it looks like {kind}"
        raise DataError(f"{_listed('unknown weights', unknown)}: this is not a Deformable DETR of a known kind{looks}.")
    refined = any("decoder.bbox_embed" in name for name in weights) or _heads_differ(renamed)
    if f"{_QUERIES}project.weight" in renamed:
        variant = "plus_plus" if "query_embed" in renamed else "two_stage"
    else:
        variant = "refine" if refined else "one_stage"
    _place_queries(renamed, variant, num_queries)
    _join_projections(renamed)
    _place_heads(renamed, variant, class_rows)
    renamed = {re.sub(r"^backbone\.layer(\d)", _stage, name): value for name, value in renamed.items()}
    _require_whole(renamed, variant)
    return renamed, variant


def has_row_per_class(weights: Mapping[str, Any]) -> bool:
    """Whether the class layers have a row per class by ascending category id, as in the files of Detic and detrex,
    instead of one per id."""
    return any(name.startswith((_DETIC, _DETREX)) for name in weights)


def rows_of_classes(weights: Mapping[str, Any], category_ids: Sequence[int]) -> list[int]:
    """Rows of the class layers of a published file for classes of these category ids, in their order.

    Args:
        weights: dict of name to Tensor, under published names.
        category_ids: of all classes that the file detects, if it has a row per class; else of any of them.

    Returns:
        The ids, or, if the file has a row per class (:func:`has_row_per_class`), their ranks.

    Raises:
        DataError: the file has a row per class, but of another number of classes: a rank would be of another class.
    """
    if not has_row_per_class(weights):
        return list(category_ids)
    counts = sorted({len(value) for name, value in weights.items() if _CLASS_LAYER.search(name)})
    if counts != [len(category_ids)]:
        raise DataError(
            f"the class layers have {' and '.join(map(str, counts)) or 'no'} rows, one for each class, but "
            f"{len(category_ids)} classes are expected: give the classes of the file's training, and no part of them."
        )
    ranks = {number: rank for rank, number in enumerate(sorted(category_ids))}
    return [ranks[number] for number in category_ids]


def _rename(weights):
    """(dict with names after ``_RULES``, unknown names)."""
    if any(name.startswith(_DETREX) for name in weights):
        dialect = _DETREX_NAMES
    else:
        dialect = _OFFICIAL if any(".norm3." in name for name in weights) else _TRANSFORMERS
    renamed, unknown = {}, []
    for name, value in weights.items():
        new = name
        for pattern, replacement in _RULES:
            match = re.fullmatch(pattern, name.removeprefix(_DETIC))
            if match:
                new = match.expand(replacement) if replacement is not None else None
                break
        else:
            unknown.append(name)
        if new is None or name in unknown:
            continue
        new = _within_layer(new, dialect)
        if new in renamed and not torch.equal(renamed[new], value):
            raise DataError(f"{name} differs from the weight that it must be equal to: the file is inconsistent.")
        renamed[new] = value
    return renamed, unknown


def _within_layer(name, dialect):
    match = re.fullmatch(r"(transformer\.(encoder|decoder)\.layers\.\d+\.)(.*)\.(weight|bias)", name)
    if not match:
        return name
    prefix, kind, inner, leaf = match.groups()
    for old, new in dialect[kind].items():
        if inner == old or inner.startswith(f"{old}."):
            inner = new + inner[len(old) :]
            break
    return f"{prefix}{inner}.{leaf}"


def _stage(match):
    return f"backbone.res{int(match.group(1)) + 1}"


def _layers(weights, name):
    """Numbers of the layers that have a head ``name``, ascending."""
    return sorted({int(key.split(".")[1]) for key in weights if key.startswith(f"{name}.")})


def _decoder_layers(weights):
    matches = [re.match(r"transformer\.decoder\.layers\.(\d+)\.", name) for name in weights]
    return max((int(match.group(1)) for match in matches if match), default=-1) + 1


def _heads_differ(weights):
    heads = [
        {key.split(".", 2)[2]: value for key, value in weights.items() if key.startswith(f"bbox_embed.{layer}.")}
        for layer in _layers(weights, "bbox_embed")
    ]
    return any(not torch.equal(head[name], heads[0][name]) for head in heads[1:] for name in head)


def _place_queries(weights, variant, number):
    """Move ``query_embed`` to the query module, its first ``number`` rows; None: all."""
    queries = weights.pop("query_embed", None)
    if number is not None and (queries is None or len(queries) < number):
        raise DataError(
            f"the first {number} learned queries are requested, but the file has {0 if queries is None else len(queries)}."
        )
    if queries is None:
        return
    queries = queries[:number]
    if variant == "plus_plus":  # the positions come from the proposals
        weights[f"{_QUERIES}content"] = queries.clone()
    else:  # [positions, content]
        weights[f"{_QUERIES}position"], weights[f"{_QUERIES}content"] = (
            part.clone() for part in queries.chunk(2, dim=1)
        )


def _join_projections(weights):
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", f"{letter}_proj"), None) for letter in "qkv"]
        if any(part is None for part in parts):
            raise DataError(f"{name} has no matching key or value projection: the file is incomplete.")
        weights[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)


def _place_heads(weights, variant, class_rows):
    """Move ``class_embed`` and ``bbox_embed`` to the class branches, the decoder and the query module."""
    last = _decoder_layers(weights)
    two_stage = variant in ("two_stage", "plus_plus")
    _restore_tied_heads(weights, last + two_stage)
    rows = None if class_rows is None else torch.tensor(list(class_rows), dtype=torch.long)
    for name in [name for name in weights if re.match(r"(class|bbox)_embed\.", name)]:
        value = weights.pop(name)
        kind, layer, inner = name.split(".", 2)
        if int(layer) == last and two_stage:
            if kind == "bbox_embed":
                weights[f"{_QUERIES}box_head.{inner}"] = value
            else:  # the published first stage trains only the first column
                weights[f"{_QUERIES}objectness.{inner}"] = value[:1].clone()
        elif int(layer) and variant == "one_stage":
            continue  # a duplicate: the layers share their heads
        elif kind == "bbox_embed":
            weights[f"transformer.decoder.box_heads.{layer}.{inner}"] = value
        elif rows is None:
            weights[f"class_branches.{layer}.{inner}"] = value
        elif len(rows):
            if int(rows.max()) >= len(value):
                raise DataError(f"{name} has {len(value)} rows, which do not include category {int(rows.max())}.")
            weights[f"class_branches.{layer}.{inner}"] = value[rows]


def _restore_tied_heads(weights, number):
    """Copy the first head to all layers if it is the only one: safetensors files store tied tensors once."""
    for kind in ("class_embed", "bbox_embed"):
        if _layers(weights, kind) == [0]:
            for name in [name for name in weights if name.startswith(f"{kind}.0.")]:
                for layer in range(1, number):
                    weights[f"{kind}.{layer}.{name.split('.', 2)[2]}"] = weights[name]


def _require_whole(weights, variant):
    """Compare names and shapes with a model whose sizes are read from the weights.

    Raises:
        DataError: names are missing or unexpected, or shapes differ; it lists them.
    """
    try:
        expected = _skeleton(weights, variant).state_dict()
    except (KeyError, IndexError) as error:
        raise DataError(f"the weights lack {error}: the file is an incomplete Deformable DETR.") from None
    if not any(name.startswith("class_branches.") for name in weights):
        expected = {name: value for name, value in expected.items() if not name.startswith("class_branches.")}
    faults = [
        ("missing weights", [name for name in expected if name not in weights]),
        ("unexpected weights", [name for name in weights if name not in expected]),
        (
            "weights of another shape",
            [name for name in weights if name in expected and weights[name].shape != expected[name].shape],
        ),
    ]
    text = "; ".join(_listed(kind, names) for kind, names in faults if names)
    if text:
        raise DataError(f"{text}: the file is not a complete Deformable DETR of the variant {variant!r}.")


def _skeleton(weights, variant):
    """A model without storage, of the sizes read from the weights."""
    levels, dim = weights["transformer.level_embed"].shape
    layer = "transformer.decoder.layers.0."
    offsets = len(weights[f"{layer}cross_attn.sampling_offsets.weight"]) // (2 * levels)
    heads = 8 if offsets % 8 == 0 else 1  # names and shapes depend only on heads * points
    kernels = [weights[f"neck.levels.{level}.0.weight"] for level in range(levels)]
    channels = [kernel.shape[1] for kernel in kernels if kernel.shape[-1] == 1] or [kernels[0].shape[1]]
    encoder_layers = {name.split(".")[3] for name in weights if name.startswith("transformer.encoder.layers.")}
    classes = [len(value) for name, value in weights.items() if name.startswith("class_branches.")] or [1]
    queries = weights.get(f"{_QUERIES}content")
    with torch.device("meta"):
        transformer = DeformableTransformer(
            variant,
            dim=dim,
            heads=heads,
            levels=levels,
            points=offsets // heads,
            ffn_dim=len(weights[f"{layer}ffn.linear1.weight"]),
            encoder_layers=len(encoder_layers),
            decoder_layers=_decoder_layers(weights),
            num_queries=1 if queries is None else len(queries),
            wide_position=variant == "plus_plus",
        )
        branches = [ClosedSetBranch(dim, classes[0]) for _ in range(transformer.num_branches)]
        neck = MultiScaleNeck(channels, dim, levels)
        return DeformableDETR(trunk_of(weights), neck, transformer, branches, ["res3", "res4", "res5"])


def trunk_of(weights: Mapping[str, Tensor]) -> ResNet:
    """Detectron2's ResNet of the depth of the weights, with the stride in the 3x3 convolution as in torchvision."""
    blocks = len({name.split(".")[2] for name in weights if name.startswith("backbone.res4.")})
    if blocks not in _DEPTHS:
        raise DataError(f"the trunk has {blocks} blocks in its third stage: ResNet-50 has 6, ResNet-101 23.")
    stages = ResNet.make_default_stages(_DEPTHS[blocks], stride_in_1x1=False, norm="FrozenBN")
    return ResNet(BasicStem(norm="FrozenBN"), stages, out_features=["res3", "res4", "res5"])


def _listed(kind, names):
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
