"""tools/build_vocabulary.py and what it stands on: word lists, synonyms, templates, imported tables, close words."""

import csv
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ovdet2.vlm.neighbours as neighbours
import ovdet2.vocabulary as vocabulary_module
from ovdet2.config import get_cfg
from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.data.words import NAMED, named_words, words_of_dataset, words_of_json, words_of_text
from ovdet2.errors import DataError, UsageError
from ovdet2.files import read_safetensors, write_json, write_safetensors
from ovdet2.modeling import build_vocabulary
from ovdet2.vlm.neighbours import close_pairs, nearest_words
from ovdet2.vlm.tables import read_table
from ovdet2.vlm.teacher import Teacher
from ovdet2.vlm.templates import get_templates, render, templates_sha256
from ovdet2.vocabulary import SCHEMA, Vocabulary, check_words
from tests import micro
from tools.build_vocabulary import main

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
CLIP_TEXT = SHARED / "clip_text"
DIM = 16
STATED = ("--architecture", "ViT-B-32", "--pretrained", "openai", "--templates", "a {name}")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")


def text_row(text):
    """A made-up unit embedding of a text, float64 [DIM]."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    row = np.random.default_rng(seed).normal(size=DIM)
    return row / np.linalg.norm(row)


class HashTeacher:
    """Stands in for CLIP: every text has an embedding of its own, whatever it is encoded with."""

    fingerprint = micro.TEACHER

    def encode_text(self, texts):
        return torch.tensor(np.stack([text_row(text) for text in texts]), dtype=torch.float32)


@pytest.fixture
def tool(monkeypatch, tmp_path, capsys):
    """Callable: run the tool with a made-up teacher; returns (vocabulary read back, what was printed)."""
    monkeypatch.setattr(Teacher, "load", lambda *arguments: HashTeacher())

    def run(*arguments):
        teacher = ("--architecture", "micro", "--pretrained", "test")
        main([*map(str, (*teacher, "--output", tmp_path / "v.safetensors", *arguments))])
        return Vocabulary.load(tmp_path / "v.safetensors"), capsys.readouterr().out

    return run


# Word lists


@pytest.mark.parametrize(
    "name, count, known",
    [
        ("coco", 80, {1: "person", 13: "stop sign", 90: "toothbrush"}),
        ("lvis", 1203, {1: "aerosol_can", 3: "airplane", 1203: "zucchini"}),
        ("objects365_v1", 365, {1: "person", 48: "toy", 159: "tissue ", 247: "CD", 365: "flashlight"}),
        ("objects365_v2", 365, {1: "Person", 4: "Other Shoes", 38: "Moniter/TV", 365: "Table Tennis "}),
        ("voc", 20, {1: "aeroplane", 11: "dining table", 20: "tv monitor"}),
        ("openimages", 601, {"/m/011k07": "Tortoise", "/m/01g317": "Person", "/m/0zvk5": "Helmet"}),
    ],
)
def test_named_sets(name, count, known):
    words = named_words(name)
    assert len(words.names) == len(words.category_ids) == len(set(words.category_ids)) == count
    found = dict(zip(words.category_ids, words.names))
    assert found | known == found
    check_words(words.names)  # no two clean to the same text
    assert (words.synonyms is None) == (name != "lvis")
    assert name == "openimages" or list(words.category_ids) == sorted(words.category_ids)


def test_every_list_of_the_package_names_its_source():
    files = sorted((ROOT / "ovdet2" / "assets" / "words").glob("*.json"))
    assert {path.stem for path in files} == set(NAMED) - {"coco", "lvis", "voc"}
    for path in files:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert len(data["source"]) > 50 and set(data) <= {"source", "corrections", "words"}


def test_coco_names_are_those_of_ov_coco():
    words = named_words("coco")
    assert dict(zip(words.category_ids, words.names)) == dict((*OV_COCO.base, *OV_COCO.novel, *OV_COCO_UNUSED))


@needs_shared
def test_lvis_names_and_synonyms_are_those_of_its_json():
    categories = json.loads((CLIP_TEXT / "lvis_v1_train_cat_info.json").read_text())
    categories = sorted(categories, key=lambda category: category["id"])
    words = named_words("lvis")
    assert words.category_ids == tuple(category["id"] for category in categories)
    assert words.names == tuple(category["name"] for category in categories)
    for category, others in zip(categories, words.synonyms):
        assert {category["name"], *others} == {category["name"], *category["synonyms"]}


@needs_shared
def test_objects365_v2_and_its_corrections():
    with open(CLIP_TEXT / "Objects365_names_fix.csv", newline="") as handle:
        rows = list(csv.reader(handle))
    plain, mended = named_words("objects365_v2"), named_words("objects365_v2", corrected=True)
    assert plain.category_ids == mended.category_ids == tuple(int(row[0]) for row in rows)
    assert [name.strip() for name in plain.names] == [row[1] for row in rows]
    differing = [(row[2], new.strip()) for row, new in zip(rows, mended.names) if row[2] != new.strip()]
    assert differing == [("Ballon", "Balloon"), ("Billards", "Billiards"), ("Noddles", "Noodles")]
    check_words(mended.names)


def test_versions_of_objects365_differ():
    first, second = named_words("objects365_v1").names, named_words("objects365_v2").names
    same = [a for a, b in zip(first, second) if a.lower() == b.lower()]
    assert same[:3] == ["person", "sneakers", "chair"] and len(same) < 20


def test_words_that_do_not_exist():
    with pytest.raises(UsageError, match="no words named 'imagenet': choose one of coco, lvis"):
        named_words("imagenet")
    with pytest.raises(UsageError, match="no spelling corrections are known for 'coco'"):
        named_words("coco", corrected=True)


def test_lists_and_files_of_words(tmp_path):
    assert words_of_text("cat, red mug").names == ("cat", "red mug") and words_of_text("cat").synonyms is None
    inline = words_of_text("sofa; couch; settee , cat;")
    assert inline.names == ("sofa", "cat") and inline.synonyms == (("couch", "settee"), ())
    (tmp_path / "w.txt").write_text("sofa; couch # furniture\ncat\n", encoding="utf-8")
    assert words_of_text(tmp_path / "w.txt").synonyms == (("couch",), ())
    write_json(tmp_path / "w.json", {"sofa": ["couch"], "cat": []})
    assert words_of_text(tmp_path / "w.json") == words_of_text(tmp_path / "w.txt")
    write_json(tmp_path / "w.json", ["sofa", "a, b"])
    assert words_of_text(tmp_path / "w.json").names == ("sofa", "a, b")
    for wrong in (7, {"sofa": "couch"}, ["cat", 3], {"sofa": ["couch", None]}):
        write_json(tmp_path / "w.json", wrong)
        with pytest.raises(DataError, match="w.json is neither a list of words nor"):
            words_of_text(tmp_path / "w.json")
    with pytest.raises(DataError, match="w.json has no categories with id and name"):
        words_of_json(tmp_path / "w.json")


LVIS_LIKE = [
    {"id": 9, "name": "bull", "synonyms": ["horned_cow"], "frequency": "r"},
    {"id": 4, "name": "sofa", "synonyms": ["sofa", "couch"], "frequency": "f"},
    {"id": 2, "name": "cat", "synonyms": ["cat"], "frequency": "c"},
]


@pytest.fixture
def lvis_root(tmp_path, monkeypatch):
    """Folder of data sets with an ov_lvis_val of three classes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "coco").mkdir()
    (tmp_path / "lvis").mkdir()
    write_json(tmp_path / "lvis" / "lvis_v1_val.json", {"images": [], "annotations": [], "categories": LVIS_LIKE})
    return tmp_path


def test_words_of_a_data_set(lvis_root):
    words = words_of_dataset("ov_lvis_val", with_synonyms=True)
    assert words.names == ("cat", "sofa", "bull") and words.category_ids == (2, 4, 9)  # base first
    assert words.synonyms == ((), ("couch",), ("horned_cow",)) and list(words.base_mask) == [True, True, False]
    assert words_of_dataset("ov_lvis_val").synonyms is None
    by_id = words_of_json(lvis_root / "lvis" / "lvis_v1_val.json")
    assert by_id.names == words.names and by_id.synonyms == words.synonyms
    with pytest.raises(UsageError, match="'nothing' is not a registered"):
        words_of_dataset("nothing")


# Synonyms


def reference(groups, templates):
    """Float64 rows [K, DIM]: mean over names of the normalised mean over prompts, normalised."""
    rows = []
    for names in groups:
        means = [np.mean([text_row(text) for text in render(name, templates)], axis=0) for name in names]
        mean = np.mean([row / np.linalg.norm(row) for row in means], axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def test_synonyms_are_averaged():
    names, others = ("sofa", "red_mug", "cat"), (("couch", "settee"), ("Red mug", "cup", "CUP."), ())
    words = Vocabulary.build(names, HashTeacher(), "photo12", synonyms=others)
    assert words.synonyms == (("sofa", "couch", "settee"), ("red_mug", "cup"), ("cat",))  # each text once
    assert np.abs(words.embeddings.double().numpy() - reference(words.synonyms, "photo12")).max() < 1e-6
    plain = Vocabulary.build(names, HashTeacher(), "photo12")
    assert np.abs(plain.embeddings.double().numpy() - reference([(name,) for name in names], "photo12")).max() < 1e-6
    assert torch.equal(words.embeddings[2], plain.embeddings[2])
    assert Vocabulary.build(names, HashTeacher(), "photo12", synonyms=((),) * 3).manifest() == plain.manifest()
    with pytest.raises(UsageError, match="a synonym of 'sofa' is empty"):
        Vocabulary.build(["sofa"], HashTeacher(), "photo12", synonyms=[["_"]])
    with pytest.raises(UsageError, match="1 words but 2 lists of synonyms"):
        Vocabulary.build(["sofa"], HashTeacher(), "photo12", synonyms=[[], []])


def test_synonyms_are_recorded(tmp_path):
    path = tmp_path / "v.safetensors"
    words = Vocabulary.build(["sofa", "cat"], HashTeacher(), "single", [True, False], (3, 5), synonyms=[["couch"], []])
    plain = Vocabulary.build(["sofa", "cat"], HashTeacher(), "single", [True, False], (3, 5))
    words.save(path)
    assert Vocabulary.load(path).manifest() == words.manifest()
    assert words.manifest()["synonyms"] == [["sofa", "couch"], ["cat"]]
    assert words.names_sha256 == plain.names_sha256 and words.synonyms_sha256 and plain.synonyms_sha256 is None
    assert words.base().synonyms == (("sofa", "couch"),)
    other = Vocabulary.build(["dog"], HashTeacher(), "single")
    assert words.joined(other).synonyms == (("sofa", "couch"), ("cat",), ("dog",))
    assert other.joined(words).synonyms == (("dog",), ("sofa", "couch"), ("cat",))
    assert plain.joined(other).synonyms is None
    tensors, manifest = read_safetensors(path, SCHEMA)
    write_safetensors(path, tensors, manifest | {"synonyms": [["sofa", "divan"], ["cat"]]})
    with pytest.raises(DataError, match="its words were changed after it was written"):
        Vocabulary.load(path)
    write_safetensors(path, tensors, manifest | {"synonyms": [["sofa", "couch"]]})
    with pytest.raises(DataError, match="2 words but 1 lists of synonyms"):
        Vocabulary.load(path)


def test_files_from_before_synonyms_still_load(tmp_path):
    words = micro.vocabulary()
    old = {key: value for key, value in words.manifest().items() if not key.startswith("synonyms")}
    tensors = {"embeddings": words.embeddings, "base_mask": words.base_mask}
    write_safetensors(tmp_path / "v.safetensors", tensors, old)
    assert Vocabulary.load(tmp_path / "v.safetensors").manifest() == words.manifest()


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.text("abcdefg", min_size=1, max_size=4), min_size=1, max_size=9, unique=True),
    data=st.data(),
)
def test_batching_and_order_do_not_matter(names, data):
    others = [data.draw(st.lists(st.text("hij", min_size=1, max_size=3), max_size=3)) for _ in names]
    whole = Vocabulary.build(names, HashTeacher(), "photo12", synonyms=others)
    order = data.draw(st.permutations(range(len(names))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary_module, "PROMPTS_AT_ONCE", data.draw(st.integers(1, 80)))
        permuted = Vocabulary.build(
            [names[i] for i in order], HashTeacher(), "photo12", synonyms=[others[i] for i in order]
        )
    assert torch.allclose(permuted.embeddings, whole.embeddings[list(order)], atol=1e-6)


def test_batches_of_the_embedded_teacher_are_singles():
    teacher = Teacher.load("ovshapes-vit", "embedded")
    names = ["red star", "blue moon", "cat", "aerosol_can", "st. bernard"]
    whole = Vocabulary.build(names, teacher, "photo12").embeddings
    singles = torch.cat([Vocabulary.build([name], teacher, "photo12").embeddings for name in names])
    assert torch.allclose(whole, singles, atol=1e-5)


# Templates


def test_templates_of_ones_own(tmp_path, tool):
    path = tmp_path / "mine.txt"
    path.write_text("# two prompts\na drawing of {article} {}.\n\nthe {} itself\n", encoding="utf-8")
    assert get_templates(path) == ("a drawing of {article} {}.", "the {} itself")
    assert render("Apple", str(path)) == ["a drawing of an apple.", "the apple itself"]
    words, printed = tool("--words", "apple", "--templates", path)
    assert words.templates == "mine.txt" and words.templates_sha256 == templates_sha256(path)
    assert np.abs(words.embeddings.double().numpy() - reference([["apple"]], path)).max() < 1e-6
    assert 'apple -> "a drawing of an apple." -> no other word' in printed  # K = 1
    before = words.templates_sha256
    path.write_text("a sketch of {}.\n", encoding="utf-8")  # an edited file is read again
    words, _ = tool("--words", "apple", "--templates", path)
    assert words.templates == "mine.txt" and words.templates_sha256 not in (None, before)
    for content in (["a sketch of {}."], {"templates": ["a sketch of {}."]}):
        write_json(tmp_path / "mine.json", content)
        assert get_templates(tmp_path / "mine.json") == get_templates(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("t.txt", "\n# nothing\n", "holds no templates"),
        ("t.txt", "a photo of {}\na photo\n", "template 1 of .*t.txt, 'a photo', has no {}"),
        ("t.json", "[]", "holds no templates"),
        ("t.json", '{"prompts": ["{}"]}', "holds no templates"),
        ("t.json", "[3]", "template 0 of .*t.json, 3, has no {}"),
        ("t.json", "[", "t.json is not valid JSON"),
        ("t.txt", None, "t.txt cannot be read"),
    ],
)
def test_bad_templates(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        get_templates(tmp_path / name)


# Imported tables


def save_table(path, table):
    np.save(path, table) if path.suffix == ".npy" else torch.save(table, path)
    return path


def test_tables_of_every_kind(tmp_path):
    rows = micro.wave((3, 4))
    for name, content, key in (
        ("t.npy", rows.numpy(), None),
        ("t.npy", rows.double().numpy(), None),
        ("t.pt", rows, None),
        ("t.pth", torch.nn.Parameter(rows), None),
        ("t.pt", {"text": rows}, None),
        ("t.pt", {"text": rows, "epoch": 3}, None),
        ("t.pt", {"text": rows, "bias": rows[0]}, "text"),
    ):
        read = read_table(save_table(tmp_path / name, content), key)
        assert read.dtype == np.float32 and np.allclose(read, rows.numpy(), atol=1e-6)
    for half in (rows.half(), rows.bfloat16()):
        assert np.allclose(read_table(save_table(tmp_path / "t.pt", half)), rows.numpy(), atol=5e-3)


@pytest.mark.parametrize(
    "name, content, key, message",
    [
        ("t.pt", {"a": torch.ones(2, 3), "b": torch.ones(2)}, None, r"a \[2, 3\], b \[2\]: choose one with --key"),
        ("t.pt", {"a": torch.ones(2, 3)}, "text", r"no tensor 'text'; it has a \[2, 3\]"),
        ("t.pt", {"epoch": 3}, None, "has the tensors none"),
        ("t.pt", torch.ones(2, 3), "text", "leave --key out"),
        ("t.npy", np.ones((2, 3)), "text", "leave --key out"),
        ("t.pt", [torch.ones(2, 3)], None, "holds a list, not a tensor"),
        ("t.pt", torch.ones(3), None, r"has shape \[3\]"),
        ("t.npy", np.ones((0, 3)), None, r"has shape \[0, 3\]"),
        ("t.npy", np.ones((2, 3), dtype=int), None, "holds int64"),
        ("t.pt", torch.ones(2, 3, dtype=torch.complex64), None, "holds complex64"),
        ("t.npy", np.array([[{}]], dtype=object), None, "t.npy is not a whole .npy table"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, key, message):
    with pytest.raises(DataError, match=message):
        read_table(save_table(tmp_path / name, content), key)


def test_damaged_tables(tmp_path):
    for name, kind in (("t.npy", "a whole .npy table"), ("t.pt", "a whole torch file")):
        path = save_table(tmp_path / name, torch.ones(40, 40).numpy() if name == "t.npy" else torch.ones(40, 40))
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"not a table", b""):
            path.write_bytes(content)
            with pytest.raises(DataError, match=f"{name} is not {kind}"):
                read_table(path)
        path.unlink()
        with pytest.raises(DataError, match=f"{name} is not {kind}.*No such file"):
            read_table(path)
    with pytest.raises(DataError, match="t.bin is neither .npy nor .pt nor .pth"):
        read_table(tmp_path / "t.bin")


class Malicious:
    """Unpickled by a careless reader, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["torch", "pickle", "npy"])
def test_a_malicious_pickle_is_not_run(tmp_path, form):
    trap, path = tmp_path / "ran", tmp_path / ("t.npy" if form == "npy" else "t.pt")
    if form == "torch":
        torch.save({"text": torch.ones(2, 3), "x": Malicious(trap)}, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    else:
        np.save(path, np.array([Malicious(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="is not a whole"):
        read_table(path)
    assert not trap.exists()


def test_import_of_a_table(tmp_path, tool):
    rows = micro.wave((3, 5))
    path = save_table(tmp_path / "t.pt", {"text": rows, "other": rows.T})
    command = ("--words", "sofa; couch, cat, dog", "--import-table", path, "--templates", "as ViLD's")
    words, printed = tool(*command, "--key", "text")
    assert torch.allclose(words.embeddings, F.normalize(rows, dim=1), atol=1e-6)
    assert words.templates == "as ViLD's" and words.templates_sha256 is None and words.synonyms is None
    assert words.teacher.weights_sha256 is None and "sofa -> as ViLD's -> " in printed
    turned, _ = tool(*command, "--key", "other", "--transpose")
    assert torch.equal(turned.embeddings, words.embeddings)
    with pytest.raises(
        DataError, match=r"t.pt is \[5, 3\], but a row is needed for each of the 3 words of --words: give --tr"
    ):
        tool(*command, "--key", "other")
    with pytest.raises(DataError, match=r"t.pt is \[5, 3\] transposed, .* --words: leave --transpose out"):
        tool(*command, "--key", "text", "--transpose")
    with pytest.raises(DataError, match=r"t.pt is \[3, 5\].* the 2 words of --words: give the words it was made for"):
        tool("--words", "sofa, cat", "--import-table", path, "--key", "text")
    for value, fault in ((0.0, "zero"), (float("nan"), "not finite"), (float("inf"), "not finite")):
        wrong = rows.clone()
        wrong[1] = value
        save_table(path, wrong)
        with pytest.raises(DataError, match=f"'cat' .row 1 of the table. is {fault}; such rows: 1"):
            tool(*command)


@needs_shared
def test_import_of_the_real_coco_table(tool):
    table = CLIP_TEXT / "coco_clip_a+cname.npy"
    categories = SHARED / "coco_mini" / "annotations" / "instances_val2017.json"
    command = ("--dataset", "ov_coco_val_all", "--import-table", table, *STATED)
    words, _ = tool(*command, "--json", categories)
    assert len(words) == 65 and words.num_base == 48 and words.embeddings.shape == (65, 512)
    assert words.names[0] == "person" and words.teacher.weights_sha256 is None
    raw = np.load(table).astype(np.float64)
    airplane = raw[4] / np.linalg.norm(raw[4])  # fifth of COCO's 80, first novel one
    assert words.names[48] == "airplane" and np.allclose(words.embeddings[48], airplane, atol=1e-5)
    by_name, _ = tool(*command, "--names", "coco")
    assert torch.equal(by_name.embeddings, words.embeddings) and by_name.manifest() == words.manifest()
    with pytest.raises(DataError, match="a row is needed for each of the 20 words of voc"):
        tool(*command, "--names", "voc")
    with pytest.raises(DataError, match=r"objects365_v1 has no category .*\(64 in all\) of ov_coco_val_all"):
        tool(
            *command[:2], "--import-table", CLIP_TEXT / "o365_clip_a+cnamefix.npy", "--names", "objects365_v1", *STATED
        )


# Close words


@needs_shared
@pytest.mark.parametrize(
    "table, names, near",
    [
        ("coco_clip_a+cname", ("coco",), {"fork": "knife", "cat": "dog", "skis": "snowboard"}),
        ("lvis_v1_clip_a+cname", ("lvis",), {"armchair": "chair", "almond": "coconut", "airplane": "jet_plane"}),
        ("o365_clip_a+cnamefix", ("objects365_v2", "--corrected"), {"Sneakers": "Other Shoes", "Car": "Sports Car"}),
    ],
)
def test_nearest_words_of_real_tables(tool, table, names, near):
    """A list of names in another order than the table's rows would give nonsense here."""
    words, printed = tool("--names", *names, "--import-table", CLIP_TEXT / f"{table}.npy", *STATED, "--show", "all")
    assert len(printed.splitlines()) >= len(words)
    for word, expected in near.items():
        assert f"{word} -> a {{name}} -> {expected} 0." in printed


@needs_shared
def test_close_words_of_a_real_table(tmp_path, tool):
    table = np.load(CLIP_TEXT / "coco_clip_a+cname.npy").astype(np.float32)
    names = list(named_words("coco").names)
    double = table[15] + 0.02 * np.linalg.norm(table[15]) * text_row("x").repeat(512 // DIM) / np.sqrt(512 // DIM)
    np.save(tmp_path / "t.npy", np.concatenate([table, double[None]]))
    write_json(tmp_path / "w.json", [*names, "tomcat"])
    words = ("--words", tmp_path / "w.json", "--import-table", tmp_path / "t.npy")
    _, printed = tool(*words, *STATED, "--show", "0")
    assert "warning: the teacher can hardly tell apart 1 pairs of words (cosine above 0.98)" in printed
    assert printed.splitlines()[2].endswith("cat | tomcat") and "... and 81 more words" in printed.splitlines()[0]


def brute_force(rows, threshold):
    cosines = rows.numpy() @ rows.numpy().T
    i, j = np.nonzero(np.triu(cosines > threshold, 1))
    return sorted(zip(cosines[i, j].tolist(), i.tolist(), j.tolist()), key=lambda pair: -pair[0])


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), cells=st.integers(1, 500), seed=st.integers(0, 99), limit=st.integers(1, 50))
def test_chunks_are_brute_force(count, cells, seed, limit):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 4)))
    rows = F.normalize(rows, dim=1)
    expected = brute_force(rows, 0.6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "CELLS_AT_ONCE", cells)
        pairs, total = close_pairs(rows, 0.6, limit)
        cosines, nearest = nearest_words(rows, torch.arange(count), 3)
    assert total == len(expected) and [p[1:] for p in pairs] == [p[1:] for p in expected[:limit]]
    assert np.allclose([p[0] for p in pairs], [p[0] for p in expected[:limit]])
    full = (rows @ rows.T).fill_diagonal_(-np.inf)
    best, at = full.topk(min(3, count - 1), dim=1)
    assert torch.equal(nearest, at) and torch.allclose(cosines, best)


def test_equal_words_are_all_counted():
    rows = F.normalize(torch.ones(50, 8), dim=1)
    pairs, total = close_pairs(rows, 0.98, 20)
    assert total == 50 * 49 // 2 and len(pairs) == 20
    assert close_pairs(torch.eye(5), 0.98) == ([], 0)


# The tool


def test_words_are_shown(tool):
    words, printed = tool("--words", "sofa; couch, cat, dog", "--show", "2")
    lines = printed.splitlines()
    assert lines[0].startswith('sofa -> "There is a sofa in the scene." -> ') and len(lines) == 4
    cosine = (words.embeddings[0] @ words.embeddings[1:].T).tolist()
    assert f"cat {cosine[0]:.2f}" in lines[0] and f"dog {cosine[1]:.2f}" in lines[0]
    assert lines[2] == "... and 1 more words (--show all prints them)"
    assert "3 words (0 base, 1 averaged over synonyms), 16 dimensions" in lines[3]
    _, printed = tool("--words", "sofa; couch, cat, dog", "--show", "all")
    assert [line.split(" -> ")[0] for line in printed.splitlines()[:3]] == ["sofa", "cat", "dog"]
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
        (("--words", "cat", "--corrected"), "--corrected is for --names"),
        (("--words", "cat", "--key", "text"), "are for --import-table"),
        (("--words", "cat", "--import-table", "t.npy", "--synonyms"), "--synonyms embeds words"),
        (("--words", "cat", "--show", "some"), "neither a number nor 'all'"),
    ],
)
def test_usage_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--architecture", "ViT-B-32", "--pretrained", "openai", "--output", "x"])
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_errors_reach_the_shell(tmp_path):
    command = [sys.executable, "tools/build_vocabulary.py", "--words", "cat, Cat", "--architecture", "ViT-B-32"]
    done = subprocess.run(
        [*command, "--pretrained", "openai", "--output", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "holds 'Cat' twice" in done.stderr and not (tmp_path / "x").exists()
