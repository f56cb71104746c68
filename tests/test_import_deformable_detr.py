"""Import of published Deformable DETR weights, on randomly initialised ones of both dialects."""

import argparse
import re

import pytest
import torch
from safetensors.torch import save_file

from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import DataError
from ovdet2.io.files import read_safetensors
from ovdet2.modeling.detr.import_weights import import_weights
from ovdet2.programs import import_deformable_detr as tool
from tests.micro_detr import CLASSES, SIZES, detector, published

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
    for dialect in (as_official, as_before_version_5):
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


def test_sizes_are_read_off_the_weights():
    imported, _ = import_weights(published("one_stage").state_dict())
    assert imported["transformer.level_embed"].shape == (SIZES["levels"], SIZES["dim"])
