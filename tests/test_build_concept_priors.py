"""tools/build_concept_priors.py with the backends that ask no language model."""

import json

import numpy as np
import pytest
import torch
from build_concept_priors import main

from ovdet2.data.datasets import split_of
from ovdet2.errors import CacheError, DataError, UsageError
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.vocabulary import Vocabulary
from tests.micro_training import SPLIT, write_data


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


def build(data, *options, dataset="ov_micro_val"):
    output = data / "out" / "p.safetensors"
    rows = main(["--dataset", dataset, "--output", str(output), *options])
    return ConceptPriors(output), rows


def test_oracle_by_the_tool(data, capsys):
    priors, rows = build(data, "--backend", "oracle", "--rho", "1", "--top-l", "all")
    (row,) = rows
    assert row["base"] == row["novel"] == row["all"] == (1.0, 1.0) and len(priors) == 12
    assert priors.words == SPLIT.names
    priors.require_dataset("ov_micro_val", data / "micro" / "val.json")
    with pytest.raises(CacheError, match="made for ov_micro_val .*, but ov_micro_train reads .*train.json"):
        priors.require_dataset("ov_micro_train", data / "micro" / "train.json")
    assert "GROUND TRUTH" in capsys.readouterr().out
    assert build(data, "--backend", "oracle", dataset="ov_micro_train")[1][0]["novel"] == (None, None)


@pytest.mark.parametrize("lists", [{"3": []}, {str(number): [["cat", 0.0]] for number in range(1, 13)}])
def test_a_prior_without_a_word_is_not_written(data, lists):
    """As of a model that answers no to everything."""
    (data / "lists.json").write_text(json.dumps(lists))
    options = ["--backend", "file", "--input", str(data / "lists.json"), "--words", "cat, dog"]
    with pytest.raises(DataError, match="no word is present in any of the 12 images of ov_micro_val, so no prior is"):
        build(data, *options)
    assert not (data / "out" / "p.safetensors").exists()
    lists["3"] = [["cat", 0.1]]
    (data / "lists.json").write_text(json.dumps(lists))
    assert build(data, *options)[0].manifest["entries"] == 1


def test_simulation_is_announced(data, capsys):
    priors, _ = build(data, "--backend", "noisy-oracle", "--precision", "0.9", "--recall", "0.5", "--seed", "4")
    assert priors.kind == "simulation" and priors.manifest["source"]["recall"] == 0.5
    assert capsys.readouterr().out.startswith("SIMULATION: ")


def test_clip_by_the_tool(data, micro_clip_weights, micro_teacher, capsys):
    options = (
        "--backend",
        "clip",
        "--architecture",
        "micro-clip",
        "--pretrained",
        str(micro_clip_weights),
        "--keep",
        "2",
    )
    priors, rows = build(data, *options, "--num-workers", "0", "--rho", "0,0.5", "--top-l", "1,all")
    assert priors.manifest["source"]["teacher"] == micro_teacher.fingerprint.to_dict() and len(rows) == 4
    assert priors.manifest["entries"] == 24 and rows[0]["words"] == 1
    # The same words by a vocabulary file: of the same teacher as it is, of another one embedded anew.
    vocabulary = Vocabulary.build(split_of("ov_micro_val").names[::-1], micro_teacher, "vild63")
    vocabulary.save(data / "v.safetensors")
    again, _ = build(data, *options, "--num-workers", "0", "--vocabulary", str(data / "v.safetensors"))
    assert "embedded anew" not in capsys.readouterr().out and again.words == SPLIT.names[::-1]
    for image_id in range(1, 13):
        assert torch.equal(again.select(image_id, names=SPLIT.names), priors.select(image_id))
    foreign = Vocabulary.from_table(
        vocabulary.names, np.eye(3), micro_teacher.fingerprint.stated("other", "x"), "stated"
    )
    foreign.save(data / "v.safetensors")
    anew, _ = build(data, *options, "--num-workers", "0", "--vocabulary", str(data / "v.safetensors"))
    assert "embedded anew" in capsys.readouterr().out and torch.equal(anew.scores(3)[1], again.scores(3)[1])


def test_bad_images_are_listed_up_to_the_limit(data, micro_clip_weights, capsys):
    for name in ("0002.png", "0005.png"):
        (data / "micro" / "images" / name).write_bytes(b"")
    options = ("--backend", "clip", "--architecture", "micro-clip", "--pretrained", str(micro_clip_weights))
    priors, _ = build(data, *options, "--num-workers", "0")
    assert priors.missing == {2, 5} and "0005.png" in capsys.readouterr().out
    with pytest.raises(DataError, match="2 images cannot be used, --max-bad-images is 1"):
        build(data, *options, "--num-workers", "0", "--max-bad-images", "1")


def test_file_and_words_by_the_tool(data, capsys):
    (data / "p.json").write_text(json.dumps({"3": [[2, 0.5], ["sofa", 0.75]], "4": [[1, 0.9]], "77": []}))
    priors, _ = build(data, "--backend", "file", "--input", str(data / "p.json"), "--words", "bar, sofa")
    assert priors.select(3, names=("sofa", "bar")).tolist() == [0, 1] and len(priors.missing) == 10
    out = capsys.readouterr().out
    assert "1 images that ov_micro_val does not have, and 1 entries of 1 words" in out
    assert "2 are not among the words; 1 words are no class of it" in out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--backend", "clip"], "--backend clip needs --architecture"),
        (["--backend", "oracle", "--tiles", "2"], "--tiles is no option of --backend oracle"),
        (["--backend", "noisy-oracle", "--precision", "0.5"], "needs --recall"),
        (["--backend", "random", "--words", "a", "--vocabulary", "v"], "--words or --vocabulary"),
        (["--backend", "random", "--keep", "0"], "--keep is at least 1"),
        (["--backend", "mllm", "--model", "m"], "needs --url and --model, or --local"),
        (["--backend", "mllm", "--local", "f", "--workers", "2"], "--workers is no option of --backend mllm --local"),
        (["--backend", "mllm", "--local", "f", "--top", "2"], "--candidates and --top go together"),
    ],
)
def test_wrong_options(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--dataset", "ov_micro_val", "--output", "x", *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_unknown_data_set_is_a_usage_error(data):
    with pytest.raises(UsageError, match="name registered data sets"):
        build(data, "--backend", "oracle", dataset="nowhere")
