"""Import of published Deformable DETR weights, on randomly initialised ones of both dialects."""

import argparse
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_safetensors
from ovdet2.modeling.detr.import_weights import import_weights
from ovdet2.programs import import_deformable_detr as tool
from tests import micro
from tests.micro_detr import CLASSES, QUERIES, SIZES, detector, published
from tests.test_detr_build import model_of

CONTENT = "transformer.query_maker.content"
VARIANTS = ["one_stage", "refine", "two_stage"]
_OFFICIAL_NAMES = [
    (r"model\.backbone\.model\.", "backbone.0.body."),
    (r"model\.(input_proj.*)", r"\1"),
    (r"model\.query_position_embeddings\.", "query_embed."),
    (r"model\.(.*)", r"transformer.\1"),
    (r"(encoder.*)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(encoder.*)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder.*)\.encoder_attn_layer_norm\.", r"\1.norm1."),
    (r"(decoder.*)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"(decoder.*)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.mlp\.fc(\d)\.", r".linear\1."),
    (r"(decoder.*)\.self_attn\.o_proj\.", r"\1.self_attn.out_proj."),
]


@pytest.fixture(scope="module", params=VARIANTS)
def state(request):
    """(variant, weights of ``transformers``)."""
    return request.param, published(request.param).state_dict()


def as_official(weights):
    """The same weights under the names of the official repository."""
    renamed = {}
    for name, value in weights.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue
        if ".self_attn.q_proj." in name:
            value = torch.cat([weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        for pattern, replacement in _OFFICIAL_NAMES:
            # The encoder's rules must not meet "decoder", which holds the word, nor "encoder_attn".
            name = re.sub(rf"(?<![a-z]){pattern}" if pattern.startswith("(encoder") else pattern, replacement, name)
        renamed[name] = value
    return renamed


def as_detic(weights):
    """The same weights under the names of Detic's files: the official ones below "detr.", Detectron2's of the trunk."""
    renamed = {"criterion.fed_loss_weight": torch.ones(CLASSES)}
    for name, value in as_official(weights).items():
        if ".fc." in name or name.endswith("num_batches_tracked"):
            continue
        if trunk := re.fullmatch(r"backbone\.0\.body\.(.*)", name):
            inner = re.sub(r"layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", trunk[1])
            inner = re.sub(r"^(conv1|bn1)", r"stem.\1", inner)
            inner = inner.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            name = "backbone.0.backbone." + re.sub(r"\bbn(\d)", r"conv\1.norm", inner)
        renamed[f"detr.{name}" if not name.startswith("criterion") else name] = value
    return renamed


_DETREX_NAMES = [
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^backbone\.(conv1|bn1)\.", r"backbone.stem.\1."),
    (r"^(backbone.*)\bbn(\d)\.", r"\1conv\2.norm."),
    (r"^(backbone.*)\.downsample\.0\.", r"\1.shortcut."),
    (r"^(backbone.*)\.downsample\.1\.", r"\1.shortcut.norm."),
    (r"^input_proj\.3\.", "neck.extra_convs.0."),
    (r"^input_proj\.", "neck.convs."),
    (r"^(neck\.\w+\.\d)\.0\.", r"\1.conv."),
    (r"^(neck\.\w+\.\d)\.1\.", r"\1.norm."),
    (r"(encoder\.layers\.\d)\.self_attn\.", r"\1.attentions.0."),
    (r"(decoder\.layers\.\d)\.self_attn\.", r"\1.attentions.0.attn."),
    (r"(decoder\.layers\.\d)\.cross_attn\.", r"\1.attentions.1."),
    (r"\.linear1\.", ".ffns.0.layers.0.0."),
    (r"\.linear2\.", ".ffns.0.layers.1."),
    (r"(encoder\.layers\.\d)\.norm1\.", r"\1.norms.0."),
    (r"(encoder\.layers\.\d)\.norm2\.", r"\1.norms.1."),
    (r"(decoder\.layers\.\d)\.norm1\.", r"\1.norms.1."),  # its first norm follows the self-attention
    (r"(decoder\.layers\.\d)\.norm2\.", r"\1.norms.0."),
    (r"(decoder\.layers\.\d)\.norm3\.", r"\1.norms.2."),
    (r"level_embed$", "level_embeds"),
    (r"^query_embed\.", "query_embedding."),
]


def as_detrex(weights):
    """The same weights under the names of detrex, with Detectron2's of the trunk."""
    renamed = {}
    for name, value in as_official(weights).items():
        if ".fc." in name or name.endswith("num_batches_tracked"):
            continue
        if name.startswith("backbone"):
            name = re.sub(r"layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
        for pattern, replacement in _DETREX_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def as_before_version_5(weights):
    """The names ``transformers`` wrote before its version 5, which are those of the files to download."""
    return {
        name.replace("model.backbone.model.", "model.backbone.conv_encoder.model.")
        .replace(".mlp.fc", ".fc")
        .replace("self_attn.o_proj", "self_attn.out_proj"): value
        for name, value in weights.items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_dialects_give_the_same_weights(state):
    variant, weights = state
    imported, found = import_weights(weights)
    assert found == variant
    for dialect in (as_official, as_before_version_5, as_detic, as_detrex):
        renamed = dialect(weights)
        assert renamed.keys() != weights.keys()
        other, found = import_weights(renamed)
        assert found == variant and same(imported, other)


def test_official_names_are_those_of_the_repository(state):
    variant, weights = state
    official = as_official(weights)
    expected = [
        "transformer.level_embed",
        "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
        "transformer.encoder.layers.1.norm2.bias",
        "transformer.decoder.layers.0.self_attn.in_proj_weight",
        "transformer.decoder.layers.0.self_attn.out_proj.bias",
        "transformer.decoder.layers.2.cross_attn.output_proj.weight",
        "transformer.decoder.layers.0.norm3.weight",
        "transformer.decoder.layers.0.linear2.weight",
        "class_embed.0.weight",
        "bbox_embed.2.layers.1.bias",
        "input_proj.3.1.weight",
        "backbone.0.body.conv1.weight",
        "backbone.0.body.layer1.0.downsample.1.running_var",
    ]
    two_stage = ["transformer.pos_trans_norm.weight", "transformer.decoder.class_embed.3.bias"]
    one_stage = ["query_embed.weight", "transformer.reference_points.bias"]
    expected += two_stage if variant == "two_stage" else one_stage
    assert [name for name in expected if name not in official] == []
    stems = ("transformer.", "backbone.0.body.", "class_embed.", "bbox_embed.", "query_embed.", "input_proj.")
    assert [name for name in official if not name.startswith(stems)] == []


def test_dropped_copies_are_not_missed(state):
    """safetensors files hold one of several tied tensors."""
    _, weights = state
    imported, _ = import_weights(weights)
    seen, kept = set(), {}
    for name, value in weights.items():
        if value.data_ptr() not in seen or not value.numel():
            kept[name] = value
            seen.add(value.data_ptr())
    assert len(kept) < len(weights)
    assert same(imported, import_weights(kept)[0])


def test_class_rows_are_chosen_by_category_id(state):
    _, weights = state
    whole, _ = import_weights(weights)
    chosen, _ = import_weights(weights, class_rows=[5, 0])
    for name, value in whole.items():
        expected = value[[5, 0]] if name.startswith("class_branches.") else value
        assert torch.equal(chosen[name], expected)
    without, _ = import_weights(weights, class_rows=[])
    assert without.keys() == {name for name in whole if not name.startswith("class_branches.")}
    with pytest.raises(DataError, match=f"{CLASSES} rows, which do not include category 90"):
        import_weights(weights, class_rows=[90])


def test_files_that_are_not_whole_are_refused(state):
    variant, weights = state
    with pytest.raises(DataError, match="1 unknown weights .model.surprise"):
        import_weights({**weights, "model.surprise": torch.zeros(1)})
    lacking = {name: value for name, value in weights.items() if name != "model.encoder.layers.1.mlp.fc2.bias"}
    with pytest.raises(DataError, match="1 missing weights .transformer.encoder.layers.1.ffn.linear2.bias"):
        import_weights(lacking)
    name = "model.input_proj.0.1.weight"
    with pytest.raises(DataError, match="1 weights of another shape .neck.levels.0.1.weight"):
        import_weights({**weights, name: weights[name][:5]})
    with pytest.raises(DataError, match="no matching key or value projection"):
        import_weights({n: value for n, value in weights.items() if "0.self_attn.k_proj.weight" not in n})
    with pytest.raises(DataError, match="lack 'transformer.level_embed'"):
        import_weights({n: value for n, value in weights.items() if "level_embed" not in n})
    if variant != "one_stage":
        copy = "model.decoder.bbox_embed.0.layers.0.bias"
        with pytest.raises(DataError, match="layers.0.bias differs from the weight that it must be equal to"):
            import_weights({**weights, copy: weights[copy] + 1})


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_the_tool_writes_what_the_checkpointer_loads(tmp_path, capsys, kind):
    weights = {name: value.float() for name, value in published("refine").state_dict().items()}
    source, output = tmp_path / f"source.{kind}", tmp_path / "out.safetensors"
    if kind == "pth":
        options = argparse.Namespace(lr=2e-4, dataset_file="coco")
        counted = {"transformer.total_ops": torch.zeros(1)}
        torch.save({"model": as_official(weights) | counted, "epoch": 49, "args": options}, source)
    else:
        save_file({name: value.clone() for name, value in weights.items()}, source)
    manifest = tool.main([str(source), "--output", str(output)])
    assert "variant refine" in capsys.readouterr().out
    assert read_safetensors(output, tool.SCHEMA)[1] == manifest and manifest["num_queries"] == 12
    wanted, _ = import_weights(weights)
    model = torch.nn.Module()
    model.network = detector("refine", wanted)
    AtomicCheckpointer(model, str(tmp_path)).load_all(str(output))
    assert same(model.network.state_dict(), wanted)
    with pytest.raises(SystemExit):
        tool.main([str(source), "--output", str(output), "--dataset", "x", "--without-classes"])


def test_detic_names_are_those_of_its_files(state):
    names = as_detic(state[1])
    for name in (
        "detr.backbone.0.backbone.stem.conv1.norm.running_var",
        "detr.backbone.0.backbone.res2.0.shortcut.weight",
        "detr.backbone.0.backbone.res5.2.conv3.norm.bias",
        "detr.transformer.decoder.layers.0.norm3.weight",
        "detr.input_proj.3.1.weight",
    ):
        assert name in names, name


def test_detic_has_a_row_per_class(tmp_path, monkeypatch):
    """By ascending category id; the official files have a row per id."""
    weights = {name: value.float() for name, value in published("two_stage").state_dict().items()}
    ids = (9, 2, 40, 50, 11, 12, 13)
    monkeypatch.setattr(tool, "split_of", lambda name: argparse.Namespace(category_ids=ids))
    torch.save({"model": as_detic(weights)}, tmp_path / "source.pth")
    tool.main([str(tmp_path / "source.pth"), "--output", str(tmp_path / "out.safetensors"), "--dataset", "any"])
    tensors, manifest = read_safetensors(tmp_path / "out.safetensors", tool.SCHEMA)
    assert manifest["class_rows"] == [1, 0, 5, 6, 2, 3, 4] and manifest["variant"] == "two_stage"
    every = import_weights(weights)[0]["class_branches.1.weight"]
    assert torch.equal(tensors["network.class_branches.1.weight"], every[[1, 0, 5, 6, 2, 3, 4]])
    assert tool.class_rows("any", weights) == list(ids)
    with pytest.raises(DataError, match="1 unknown weights .detr.surprise"):
        import_weights({**as_detic(weights), "detr.surprise": torch.zeros(1)})


def test_sizes_are_read_off_the_weights():
    imported, _ = import_weights(published("one_stage").state_dict())
    assert imported["transformer.level_embed"].shape == (SIZES["levels"], SIZES["dim"])


def h_deformable_detr(rows, classes=CLASSES):
    """Weights of a small H-Deformable-DETR by a formula, under its names: the official ones of two stages, a learned
    content of ``rows`` queries, and an encoding of boxes of 2 C channels."""
    weights = as_official(published("two_stage", classes=classes).state_dict())
    weights["query_embed.weight"] = torch.zeros(rows, SIZES["dim"], dtype=torch.float64)
    filled = {}
    for number, (name, value) in enumerate(sorted(weights.items())):
        if "backbone" in name or not value.is_floating_point():
            filled[name] = value
            continue
        wave = micro.wave(value.shape, 0.3 + 0.01 * number).double()
        filled[name] = wave * (1.5 / value[0].numel() ** 0.5) if value.ndim > 1 else value + 0.1 * wave
    for name in list(filled):  # the repository saves both names of one layer
        copy = name.removeprefix("transformer.decoder.")
        if copy != name and copy in filled:
            filled[name] = filled[copy]
    return filled


@torch.no_grad()
def test_weights_of_h_deformable_detr():
    """Content of the first queries, positions from the first half of a layer norm over 2 C; all else as two stages."""
    weights = h_deformable_detr(rows=QUERIES + 8)
    imported, variant = import_weights(weights, num_queries=QUERIES)
    assert variant == "plus_plus" and len(import_weights(weights)[0][CONTENT]) == QUERIES + 8
    assert torch.equal(imported[CONTENT], weights["query_embed.weight"][:QUERIES])
    ours = detector("plus_plus", imported, wide_position=True).double().eval()
    ours.load_state_dict(imported)
    with pytest.raises(RuntimeError, match="box_norm"):  # without the setting the sizes do not fit
        detector("plus_plus", imported).load_state_dict(imported)
    # The positions, stated with numpy; the wavelengths of the model are float32.
    maker, boxes = ours.transformer.query_maker, torch.tensor([[[0.4, 0.3, 0.2, 0.5]]], dtype=torch.float64)
    half = SIZES["dim"] // 2
    angles = 2 * np.pi * boxes[0, 0].numpy()[:, None] / 10_000 ** (2 * (np.arange(half) // 2) / half)
    encoded = np.where(np.arange(half) % 2, np.cos(angles), np.sin(angles)).reshape(-1)
    linear, norm = ("transformer.pos_trans", "transformer.pos_trans_norm")
    hidden = weights[f"{linear}.weight"].numpy() @ encoded + weights[f"{linear}.bias"].numpy()
    hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
    wanted = (hidden * weights[f"{norm}.weight"].numpy() + weights[f"{norm}.bias"].numpy())[: SIZES["dim"]]
    np.testing.assert_allclose(maker.encode_position(boxes)[0, 0].numpy(), wanted, atol=1e-6)
    # Everything else: the two-stage detector, which is compared with transformers elsewhere, with the learned content.
    two_stage, found = import_weights({name: w for name, w in weights.items() if name != "query_embed.weight"})
    other = detector(found, two_stage).double().eval()
    other.load_state_dict(two_stage)
    torch.manual_seed(0)
    features = [
        torch.randn(1, SIZES["dim"], *shape, dtype=torch.float64) for shape in ((8, 12), (4, 6), (2, 3), (1, 2))
    ]
    memory = ours.transformer.encode(features, [torch.zeros(1, *f.shape[-2:], dtype=torch.bool) for f in features])
    queries = other.transformer.queries(memory)
    queries = replace(queries, content=weights["query_embed.weight"][None, :QUERIES])
    expected = other.transformer.decode(memory, queries)
    got = ours.transformer.decode(memory, ours.transformer.queries(memory))
    torch.testing.assert_close(got.boxes_cxcywh, expected.boxes_cxcywh, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.hidden, expected.hidden, atol=1e-12, rtol=0)
    logits = ours.class_branches[-1](got.hidden[-1])
    torch.testing.assert_close(logits, other.class_branches[-1](expected.hidden[-1]), atol=1e-12, rtol=0)


def test_more_learned_queries_than_the_file_has():
    with pytest.raises(DataError, match="the first 300 learned queries are requested, but the file has 12"):
        import_weights(h_deformable_detr(rows=12), num_queries=300)
    with pytest.raises(DataError, match="the file has 0"):
        import_weights(published("two_stage").state_dict(), num_queries=300)


def test_the_tool_imports_h_deformable_detr_for_its_configuration(tmp_path, capsys):
    source, output = tmp_path / "source.pth", tmp_path / "out.safetensors"
    torch.save({"model": h_deformable_detr(rows=QUERIES + 8)}, source)
    manifest = tool.main([str(source), "--output", str(output), "--queries", str(QUERIES)])
    assert manifest["variant"] == "plus_plus" and manifest["num_queries"] == QUERIES
    assert "Set MODEL.DETR.WIDE_POSITION True" in capsys.readouterr().out
    wide = ["MODEL.DETR.VARIANT", "plus_plus", "MODEL.DETR.WIDE_POSITION", "True"]
    maker = model_of(*wide).network.transformer.query_maker
    assert maker.box_norm.normalized_shape == (2 * maker.dim,)
    with pytest.raises(UsageError, match="WIDE_POSITION is a setting of plus_plus"):
        model_of("MODEL.DETR.VARIANT", "refine", "MODEL.DETR.WIDE_POSITION", "True")
