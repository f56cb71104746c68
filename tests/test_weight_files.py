"""Weight files of other programs: their arrangements, what is no weight file, and what a file seems to be."""

import argparse
import io
import json
import pickle
import warnings

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_safetensors
from ovdet2.io.weights import DamagedFile, known_kind, read_entries, read_weights, unwrapped
from ovdet2.vlm.tables import read_table
from ovdet2.vlm.teacher import Teacher

WEIGHTS = {"backbone.conv.weight": torch.ones(2, 3), "head.bias": torch.arange(3.0), "steps": torch.tensor(4)}

# name -> how a training program saves the weights
ARRANGEMENTS = {
    "plain": dict,
    "model": lambda weights: {"model": weights, "optimizer": {"lr": 1.0}, "args": argparse.Namespace(epochs=3)},
    "state_dict": lambda weights: {"epoch": 3, "state_dict": weights},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "optimizer_state_dict": {}},
    "DeepSpeed": lambda weights: {"module": weights, "dp_world_size": 8},
    "DDP": lambda weights: prefixed(weights, "module."),
    "compiled": lambda weights: prefixed(weights, "_orig_mod."),
    "a compiled module": lambda weights: {
        name.replace("backbone.", "backbone._orig_mod."): v for name, v in weights.items()
    },
    "DDP of compiled": lambda weights: {"state_dict": prefixed(weights, "module._orig_mod.")},
    "compiled DDP": lambda weights: {"model": prefixed(weights, "_orig_mod.module.")},
    "Lightning": lambda weights: {"pytorch-lightning_version": "2.5", "state_dict": prefixed(weights, "model.")},
    "Lightning with a loss": lambda weights: {
        "pytorch-lightning_version": "2.5",
        "state_dict": prefixed(weights, "net._orig_mod.") | {"criterion.weight": torch.ones(2)},
    },
    "twice": lambda weights: {"model": {"state_dict": weights, "epoch": 2}},
}


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_every_arrangement_gives_the_same_weights(arrangement, tmp_path):
    torch.save(ARRANGEMENTS[arrangement](WEIGHTS), tmp_path / "weights.pth")
    data = read_weights(tmp_path / "weights.pth")
    weights = data["model"]
    weights.pop("criterion.weight", None)
    assert list(weights) == list(WEIGHTS) and all(torch.equal(weights[name], WEIGHTS[name]) for name in WEIGHTS)


def test_other_entries_are_kept():
    data = unwrapped(ARRANGEMENTS["model"](WEIGHTS))
    assert data["optimizer"] == {"lr": 1.0} and data["args"].epochs == 3 and set(data) == {"model", "optimizer", "args"}


NAMES = st.lists(st.sampled_from(["conv", "head", "module_a", "model", "state"]), min_size=1, max_size=3).map(".".join)


@given(st.dictionaries(NAMES.map(lambda name: f"{name}.weight"), st.just(torch.ones(1)), min_size=1))
def test_unwrapping_twice_changes_nothing(weights):
    once = unwrapped(weights)
    assert unwrapped(once) == once
    for wrap in ("module.", "_orig_mod.", "module._orig_mod."):
        assert unwrapped(prefixed(weights, wrap)) == once


def test_a_prefix_of_some_names_is_a_module_of_the_model():
    weights = {"module.conv.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert unwrapped(weights) == {"model": weights}


# content of a file, part of the message
NO_WEIGHTS = {
    "web page": (b"<!DOCTYPE html><html><title>Sign in</title></html>", "holds HTML or XML, perhaps the error page"),
    "web page with space before it": (b"\n\n  <html>", "holds HTML or XML"),
    "pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    "empty": (b"", "it is empty"),
    "text": (b"these are no weights", "download or save it again"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl", ".pt", ".bin"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_files_that_hold_something_else(kind, suffix, tmp_path):
    content, message = NO_WEIGHTS[kind]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=rf"(?s)weights\{suffix} .*{message}"):
        read_weights(path)


@given(rest=st.binary(max_size=60), place=st.integers(0, 400), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_of_any_kind_is_named(rest, place, byte, tmp_path):
    whole = io.BytesIO()
    torch.save({"a": torch.ones(2)}, whole, _use_new_zipfile_serialization=False)
    changed = bytearray(whole.getvalue())
    changed[place % len(changed)] = byte
    path = tmp_path / "w.pth"
    for content in (b"\x80\x02" + rest, bytes(changed)):
        path.write_bytes(content)
        try:
            read_weights(path)
        except DataError as error:
            assert "w.pth" in str(error)


def test_a_folder_is_no_weight_file(tmp_path):
    with pytest.raises(DataError, match="is a folder, not a weight file: set MODEL.WEIGHTS to a file in it"):
        read_weights(tmp_path)


def test_dicts_that_hold_themselves_and_names_that_are_no_text(tmp_path):
    data = {0: torch.ones(2)}
    torch.save({"model": data}, tmp_path / "n.pth")
    assert list(read_weights(tmp_path / "n.pth")["model"]) == ["0"]
    data["model"] = data
    torch.save(data, tmp_path / "r.pth")
    assert torch.equal(read_weights(tmp_path / "r.pth")["model"]["0"], torch.ones(2))


def module_file(path):
    torch.save(nn.Linear(2, 2), path)


def module_in_dict(path):
    torch.save({"model": nn.Linear(2, 2)}, path)


def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the age of scripts
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def only_numbers(path):
    torch.save({"epoch": 3, "best": 0.5}, path)


def of_a_list(path):
    torch.save([torch.ones(2)], path)


CASES = {
    module_file: "holds more than tensors.*could run code: save only its state dict",
    module_in_dict: "holds more than tensors.*could run code: save only its state dict",
    script: "is a TorchScript program and no weight file",
    only_numbers: "holds no weights, only 'epoch', 'best'",
    of_a_list: "holds a list, not a dict of weights",
}


@pytest.mark.parametrize("write", CASES)
def test_modules_and_files_without_weights(write, tmp_path):
    write(tmp_path / "m.pth")
    with pytest.raises(DataError, match=f"m.pth {CASES[write]}"):
        read_weights(tmp_path / "m.pth")


@pytest.mark.parametrize("write", [*CASES, lambda path: path.write_bytes(b"\x80\x02not a pickle")])
@pytest.mark.parametrize("read", [read_weights, read_table, lambda path: Teacher.load("micro-clip", path)])
def test_no_message_advises_to_read_unsafely(write, read, tmp_path, micro_clip_weights):
    write(tmp_path / "m.pth")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "m.pth")
    for advice in ("weights_only", "safe_globals", "trust", "Please use"):
        assert advice not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite(value, dtype, tmp_path):
    weights = dict(WEIGHTS, **{"head.bias": torch.tensor([0.0, value], dtype=dtype)})
    torch.save({"model": weights}, tmp_path / "w.pth")
    with pytest.raises(DamagedFile, match=r"w.pth: 1 of its 3 weights .* not finite \(head.bias\): the training"):
        read_weights(tmp_path / "w.pth")
    masked = dict(WEIGHTS, attn_mask=torch.full((2, 2), -float("inf")))
    torch.save(masked, tmp_path / "masked.pth")
    assert len(read_weights(tmp_path / "masked.pth")["model"]) == 4


def test_arrays_that_are_not_finite(tmp_path):
    for order in "<>":
        content = {"model": {"a": np.array([1.0, np.nan], f"{order}f4")}, "__author__": "zoo"}
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(DamagedFile, match="not finite"):
            read_weights(tmp_path / "w.pkl")


def test_tied_tensors_are_written_in_full(tmp_path):
    table = torch.arange(12.0).reshape(4, 3)
    tensors = {
        "embed": table,
        "head": table,
        "part": table[1:3],
        "turned": table.T,
        "empty": table[:0],
        "none": table[:0],
    }
    write_safetensors(tmp_path / "t.safetensors", tensors, {"schema": "any"})
    saved = load_file(tmp_path / "t.safetensors")
    assert set(saved) == set(tensors) and all(torch.equal(saved[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "names, kind",
    [
        (
            ["text_model.a", "vision_model.b", "text_projection.weight"],
            "names of transformers (CLIPModel, SiglipModel)",
        ),
        (["vision_model.b"], "only the image tower of a CLIP, with the names of transformers"),
        (["visual.conv1.weight"], "only the image tower of a CLIP, without its texts"),
        (["class_embedding", "ln_pre.weight", "transformer.resblocks.0"], "only an image tower"),
        (["patch_embed.proj.weight", "blocks.0.norm1.weight"], "only an image tower"),
        (["visual.conv1.weight", "token_embedding.weight"], "a CLIP with the names of open_clip"),
        (["roi_heads.box_head.fc1.weight", "backbone.res2"], "a two-stage detector"),
        (["conv1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.bias"], "only a ResNet"),
    ],
)
def test_what_a_file_seems_to_be(names, kind):
    assert kind in known_kind(names)


def test_own_names_are_of_no_other_kind():
    assert known_kind(WEIGHTS) is None


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_a_teacher_of_every_arrangement(arrangement, micro_clip_weights, tmp_path):
    weights = load_file(micro_clip_weights)
    torch.save(ARRANGEMENTS[arrangement](weights), tmp_path / "w.pt")
    if arrangement == "Lightning with a loss":  # criterion.weight is no weight of a CLIP
        with pytest.raises(DataError, match="criterion.weight"):
            Teacher.load("micro-clip", tmp_path / "w.pt")
        return
    loaded = Teacher.load("micro-clip", tmp_path / "w.pt").clip.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in weights.items())


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_files_that_are_no_teacher(suffix, micro_clip_weights, tmp_path):
    weights = load_file(micro_clip_weights)
    for changed, message in (
        (
            {name: value for name, value in weights.items() if name.startswith("visual.")},
            "only the image tower of a CLIP",
        ),
        ({"vision_model.a": torch.ones(2), "text_model.b": torch.ones(2)}, r"names of transformers \(CLIPModel"),
        (dict(weights, logit_scale=torch.tensor(float("nan"))), "not finite"),
    ):
        path = tmp_path / f"w.{suffix}"
        torch.save(changed, path) if suffix == "pt" else save_file(changed, path)
        with pytest.raises(DataError, match=message):
            Teacher.load("micro-clip", path)
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(DataError, match="page.pt .*holds HTML"):
        Teacher.load("micro-clip", tmp_path / "page.pt")


@pytest.mark.parametrize(
    "name, meant", [("ViT-B/32", "ViT-B-32"), ("ViT-L/14@336px", "ViT-L-14-336"), ("RN-50", "RN50")]
)
def test_names_of_other_programs_get_a_hint(name, meant):
    with pytest.raises(UsageError, match=rf"did you mean {meant}"):
        Teacher.load(name, "openai")


def test_a_mistyped_tag_gets_a_hint():
    with pytest.raises(
        UsageError, match=r"'opanai' is neither a file nor a pretrained tag of RN50 \(did you mean openai"
    ):
        Teacher.load("RN50", "opanai")


@pytest.fixture
def hub_tokenizer(tmp_path, monkeypatch):
    """An architecture, "micro-hub", with a tokenizer of transformers in a folder, 8 tokens long."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(20))]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A [EOS]", special_tokens=[("[EOS]", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", model_max_length=8
    )
    fast.save_pretrained(tmp_path / "tokenizer")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 8,
            "vocab_size": 23,
            "width": 64,
            "heads": 1,
            "layers": 1,
            "hf_tokenizer_name": str(tmp_path / "tokenizer"),
        },
    }
    (tmp_path / "micro-hub.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "micro-hub.json")
    clip = open_clip.create_model("micro-hub")
    save_file(clip.state_dict(), tmp_path / "w.safetensors")
    yield tmp_path
    (tmp_path / "micro-hub.json").unlink()
    open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path / "micro-hub.json")
    open_clip.factory._rescan_model_configs()


def test_long_prompts_of_a_tokenizer_of_transformers(hub_tokenizer):
    teacher = Teacher.load("micro-hub", hub_tokenizer / "w.safetensors")
    longest = " ".join(f"w{number}" for number in range(7))  # and the end token
    assert teacher.encode_text([longest, "w1", ""]).shape == (3, 16)
    for number in range(8, 30):
        text = " ".join(f"w{each % 20}" for each in range(number))
        with pytest.raises(UsageError, match="more than the 8 tokens that micro-hub reads"):
            teacher.encode_text(["w1", text])


def test_prompts_of_few_characters_and_many_tokens(micro_teacher):
    """Characters of several bytes can be several tokens each."""
    with pytest.raises(UsageError, match="more than the 14 tokens"):
        micro_teacher.encode_text(["\U0001f984\U0001f9ff\U0001fae7\U0001f6d1" * 3])


def test_a_tokenizer_that_is_not_at_hand(hub_tokenizer, monkeypatch):
    from huggingface_hub import constants

    for file in (hub_tokenizer / "tokenizer").iterdir():
        file.unlink()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    asked = []
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: asked.append(args))
    with pytest.raises(DataError, match=r"(?s)tokenizer .*tokenizer of micro-hub is not on this machine .*HF_HOME"):
        Teacher.load("micro-hub", hub_tokenizer / "w.safetensors")
    assert not asked  # the weights, which take longer, are not read first


def test_entries_are_read_without_the_others(tmp_path):
    """Of a .safetensors file; a checkpoint may have none of them."""
    weights = WEIGHTS | {"backbone.conv.weight": torch.full((2, 3), torch.nan)}  # not read, so not refused
    save_file(weights, tmp_path / "weights.safetensors")
    torch.save({"model": WEIGHTS}, tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        entries = read_entries(tmp_path / name, "head.")
        assert list(entries) == ["head.bias"] and torch.equal(entries["head.bias"], WEIGHTS["head.bias"])
        assert read_entries(tmp_path / name, "vocabulary.") == {}
    with pytest.raises(DamagedFile, match="not finite .backbone.conv.weight"):
        read_entries(tmp_path / "weights.safetensors", "conv")
