"""How words become embeddings: synonyms averaged, prompt templates of one's own, batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ovdet2.vocabulary.table as vocabulary_module
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_safetensors, write_json, write_safetensors
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import SCHEMA, Vocabulary
from ovdet2.vocabulary.templates import get_templates, render, templates_sha256
from tests import micro
from tests.vocabulary_cases import HashTeacher, reference, tool_runner


@pytest.fixture
def tool(monkeypatch, tmp_path, capsys):
    return tool_runner(monkeypatch, tmp_path, capsys)


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
