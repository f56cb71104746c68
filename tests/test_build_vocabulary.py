"""tools/build_vocabulary.py: what it prints, writes and refuses; a run with its vocabularies."""

import pytest
from build_vocabulary import main

from ovdet2.config import get_cfg
from ovdet2.data.datasets.words import words_of_dataset
from ovdet2.errors import UsageError
from ovdet2.io.files import write_json
from ovdet2.modeling import build_vocabulary
from tests.processes import run_program
from tests.vocabulary_cases import HashTeacher, tool_runner, write_lvis


@pytest.fixture
def tool(monkeypatch, tmp_path, capsys):
    return tool_runner(monkeypatch, tmp_path, capsys)


@pytest.fixture
def lvis_root(tmp_path, monkeypatch):
    write_lvis(monkeypatch, tmp_path)
    return tmp_path


def test_words_are_shown(tool):
    words, printed = tool("--words", "sofa; couch, cat, dog", "--show", "2")
    lines = printed.splitlines()
    assert lines.pop(0) == "embedding 4 names in 63 templates each: 252 prompts"
    assert lines[0].startswith('sofa -> "There is a sofa in the scene." -> ') and len(lines) == 4
    cosine = (words.embeddings[0] @ words.embeddings[1:].T).tolist()
    assert f"cat {cosine[0]:.2f}" in lines[0] and f"dog {cosine[1]:.2f}" in lines[0]
    assert lines[2] == "... and 1 more words (--show all prints them)"
    assert "3 words (0 base, 1 averaged over synonyms), 16 dimensions" in lines[3]
    _, printed = tool("--words", "sofa; couch, cat, dog", "--show", "all")
    assert [line.split(" -> ")[0] for line in printed.splitlines()[1:4]] == ["sofa", "cat", "dog"]
    plain, printed = tool("--words", "sofa; couch, cat, dog", "--no-synonyms", "--show", "0")
    assert plain.synonyms is None and "0 averaged" in printed and plain.names == words.names


def test_synonyms_of_data_sets_are_asked_for(tool, lvis_root):
    sources = (("--names", "lvis"), ("--dataset", "ov_lvis_val"), ("--json", lvis_root / "lvis" / "lvis_v1_val.json"))
    for source in sources:
        plain, _ = tool(*source, "--templates", "single")
        words, _ = tool(*source, "--templates", "single", "--synonyms")
        assert plain.synonyms is None and plain.names == words.names and plain.category_ids == words.category_ids
        bull = words.names.index("bull")
        assert words.synonyms[bull] == ("bull", "horned_cow")
        assert words.embeddings[bull] @ plain.embeddings[bull] < 0.99
    for source in (("--names", "coco"), ("--words", "cat, dog")):
        with pytest.raises(UsageError, match="the source of the words lists none: leave it out"):
            tool(*source, "--synonyms")


@pytest.mark.parametrize(
    "name, data_set, json_file",
    [
        ("coco", "transfer_coco_2017_val", "coco/annotations/instances_val2017.json"),
        ("objects365_v1", "transfer_objects365_v1_val", "objects365/objects365_val.json"),
        ("voc", "transfer_voc_2007_test", "VOC2007/voc_2007_test.json"),
    ],
)
def test_named_sets_are_accepted_by_a_run(tool, tmp_path, monkeypatch, name, data_set, json_file):
    """MODEL.VOCABULARY.FILE: the words are those of the transfer targets, whose json defines them."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    words, _ = tool("--names", name, "--templates", "single")
    categories = [{"id": i, "name": n} for i, n in zip(words.category_ids, words.names)]
    write_json(tmp_path / json_file, {"images": [], "annotations": [], "categories": categories[::-1]})
    for folder in ("coco/val2017", "objects365/val", "VOC2007/JPEGImages"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    cfg = get_cfg()
    cfg.DATASETS.TEST = (data_set,)
    cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED = "micro", "test"
    cfg.MODEL.VOCABULARY.FILE = str(tmp_path / "v.safetensors")
    assert build_vocabulary(cfg).manifest() == words.manifest()
    assert words_of_dataset(data_set).names == words.names


def test_synonyms_are_accepted_by_a_run(tool, lvis_root):
    words, _ = tool("--dataset", "ov_lvis_val", "--synonyms")
    cfg = get_cfg()
    cfg.DATASETS.TEST = ("ov_lvis_val",)
    cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED = "micro", "test"
    cfg.MODEL.VOCABULARY.FILE = str(lvis_root / "v.safetensors")
    assert build_vocabulary(cfg).synonyms == words.synonyms == (("cat",), ("sofa", "couch"), ("bull", "horned_cow"))


def test_an_interrupted_build_leaves_nothing(tool, tmp_path, monkeypatch):
    def interrupted(self, texts):
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setattr(HashTeacher, "encode_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool("--words", "cat", "--output", folder / "v.safetensors")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "give one of --words"),
        (("--words", "cat", "--names", "coco"), "give one of --words"),
        (("--dataset", "ov_coco_val_all", "--names", "coco"), "give one of --words"),
        (("--names", "imagenet"), "invalid choice"),
        (("--words", "cat", "--corrected"), "--corrected requires --names"),
        (("--words", "cat", "--key", "text"), "require --import-table"),
        (("--words", "cat", "--first-of-duplicates"), "is for --import-table without --dataset"),
        (
            ("--dataset", "ov_coco_val_all", "--import-table", "t.npy", "--first-of-duplicates"),
            "is for --import-table without --dataset",
        ),
        (("--words", "cat", "--import-table", "t.npy", "--synonyms"), "--synonyms embeds words"),
        (("--words", "cat", "--show", "some"), "neither a number nor 'all'"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--architecture", "ViT-B-32", "--pretrained", "openai", "--output", "x"])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_errors_reach_the_shell(tmp_path):
    command = ["tools/build_vocabulary.py", "--words", "cat, Cat", "--architecture", "ViT-B-32"]
    done = run_program(*command, "--pretrained", "openai", "--output", tmp_path / "x")
    assert done.returncode == 2 and "'cat' and 'Cat' (words" in done.stderr and not (tmp_path / "x").exists()
