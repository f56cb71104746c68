"""Words, prompts, embedding files: ViLD's rules, round trips, and every refusal."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_safetensors
from ovdet2.vlm.fingerprint import Fingerprint, require_same_teacher
from ovdet2.vocabulary import Vocabulary, check_words, from_buffers, manifest_bytes
from ovdet2.vocabulary.templates import article, clean_name, get_templates, render, template_set_names, templates_sha256
from tests import micro

ROOT = Path(__file__).resolve().parents[1]
HASHES = {
    "detic": "9a4487ccbedf",
    "openclip80": "4f976686fb65",
    "photo12": "9689bee84535",
    "single": "1f9df4a09f4f",
    "vild63": "93950afe1b68",
}
SHARED = ROOT.parent / "shared" / "data"


class LengthTeacher:
    """Stands in for CLIP: a text's embedding depends on its length and first letter only."""

    fingerprint = micro.TEACHER

    def encode_text(self, texts):
        rows = torch.tensor([[len(t), ord(t[0]), 40.0] for t in texts])
        return rows / rows.norm(dim=1, keepdim=True)


def test_template_sets():
    assert template_set_names() == ["detic", "openclip80", "photo12", "single", "vild63"]
    assert [len(get_templates(name)) for name in template_set_names()] == [1, 80, 12, 1, 63]
    for name in template_set_names():
        assert all(template.count("{}") == 1 for template in get_templates(name))
        assert len(set(get_templates(name))) == len(get_templates(name))
    with pytest.raises(UsageError, match="unknown template set 'vild'"):
        get_templates("vild")


def test_vild_templates_are_the_published_ones():
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    published = json.loads((SHARED / "vild_templates.json").read_text())["templates"]
    assert list(get_templates("vild63")) == published


def test_template_sets_are_not_edited_by_accident():
    """Vocabularies state these hashes; a change of a set makes every embedding made with it another one."""
    found = {name: templates_sha256(name)[:12] for name in template_set_names()}
    assert found == HASHES


def test_vild_rules():
    assert clean_name("Bow_(weapon)") == "bow (weapon)"
    assert clean_name("cabinet/shelf.") == "cabinet or shelf"
    assert [article(word) for word in ("apple", "hour", "unicorn", "cat")] == ["an", "a", "an", "a"]
    texts = render("Aerosol_can", "vild63")
    assert texts[0] == "There is an aerosol can in the scene." and texts[5] == "itap of an aerosol can."
    assert texts[8] == "This is a photo of an aerosol can." and texts[52] == "This is the plastic aerosol can."
    assert sum(text.startswith("This is ") for text in texts) == 58
    assert render("cat", "single") == ["a photo of a cat."]


def test_build_normalises_averages_normalises():
    words = Vocabulary.build(["apple", "cat"], LengthTeacher(), "photo12", [True, False], [3, 7])
    rows = np.array([[len(t), ord(t[0]), 40.0] for t in render("apple", "photo12")], dtype=np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    mean = rows.mean(0)
    assert np.allclose(words.embeddings[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert words.num_base == 1 and words.base().names == ("apple",) and words.base().category_ids == (3,)


def test_file_round_trip(tmp_path):
    words = micro.vocabulary()
    words.save(tmp_path / "v.safetensors")
    back = Vocabulary.load(tmp_path / "v.safetensors")
    assert torch.equal(back.embeddings, words.embeddings) and torch.equal(back.base_mask, words.base_mask)
    assert back.manifest() == words.manifest()
    again = from_buffers(words.embeddings, words.base_mask, manifest_bytes(words))
    assert again.manifest() == words.manifest()


@pytest.mark.parametrize(
    "names, message",
    [
        ((), "vocabulary is empty"),
        (("cat", " "), "word 1 of the vocabulary is empty"),
        (("red mug", "cat", "Red_mug"), "twice: 'red mug' and 'Red_mug'"),
    ],
)
def test_bad_words(names, message):
    with pytest.raises(UsageError, match=message):
        Vocabulary.build(names, LengthTeacher())


def test_bad_embeddings():
    words = micro.vocabulary()
    rows = words.embeddings.clone()
    rows[2] *= 2
    with pytest.raises(DataError, match="'striped ring' .row 2. has norm 2.0"):
        Vocabulary(words.names, words.base_mask, rows, words.teacher, "single")
    with pytest.raises(DataError, match="shape \\[4, 8\\]"):
        Vocabulary(words.names, words.base_mask, rows[:4], words.teacher, "single")
    with pytest.raises(DataError, match="'cat' .row 0 of the table. is zero; such rows: 2"):
        Vocabulary.from_table(["cat", "dog"], np.zeros((2, 4)), words.teacher, "none")
    with pytest.raises(DataError, match="there are 3 words"):
        Vocabulary.from_table(["cat", "dog", "cow"], np.ones((2, 4)), words.teacher, "none")


def test_damaged_files(tmp_path):
    path = tmp_path / "v.safetensors"
    with pytest.raises(DataError, match="does not exist: build it with ovdet2 vocab"):
        Vocabulary.load(path)
    micro.vocabulary().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        Vocabulary.load(path)
    words = micro.vocabulary()
    tensors = {"embeddings": words.embeddings, "base_mask": words.base_mask}
    for tensors_of, manifest, message in (
        ({"base_mask": words.base_mask}, words.manifest(), "v.safetensors: it has no 'embeddings'"),
        (
            tensors,
            words.manifest() | {"names": ["cat"] * 5},
            "v.safetensors: the vocabulary holds the same word twice: 'cat' and 'cat'",
        ),
        (tensors, words.manifest() | {"names": list("abcde")}, "its words were changed after it was written"),
        (tensors, {k: v for k, v in words.manifest().items() if k != "teacher"}, "has no teacher fingerprint"),
        (tensors | {"embeddings": words.embeddings * float("nan")}, words.manifest(), "norm nan"),
    ):
        write_safetensors(path, tensors_of, manifest)
        with pytest.raises(DataError, match=message):
            Vocabulary.load(path)
    write_safetensors(path, {"x": torch.zeros(1)}, {"schema": "something/1"})
    with pytest.raises(DataError, match="schema 'something/1'"):
        Vocabulary.load(path)


def test_fingerprints():
    hashed, other = Fingerprint("ViT-B-32", "openai", "a" * 64), Fingerprint("ViT-B-32", "openai", "b" * 64)
    stated = Fingerprint.stated("ViT-B-32", "openai")
    require_same_teacher(hashed, "x", Fingerprint("ViT-B-32-quickgelu", "my_copy.pt", "a" * 64), "y")
    require_same_teacher(stated, "x", Fingerprint.stated("ViT-B-32-quickgelu", "openai"), "y")
    require_same_teacher(hashed, "x", stated, "y")
    for wrong in (other, Fingerprint.stated("ViT-B-16", "openai"), Fingerprint.stated("ViT-B-32", "laion2b_s34b_b79k")):
        with pytest.raises(DataError, match="x is of teacher ViT-B-32 / openai .aaaaaaaaaaaa.*y is of teacher"):
            require_same_teacher(hashed, "x", wrong, "y")
    with pytest.raises(DataError, match="their activation function is not: .*need ViT-B-32-quickgelu"):
        require_same_teacher(hashed, "x", Fingerprint("ViT-B-32", "my_copy.pt", "a" * 64), "y")  # loaded with GELU


def test_all_repeated_words_are_named_up_to_ten():
    names = [f"word {i}" for i in range(12)]
    with pytest.raises(UsageError) as raised:
        check_words(["Cat", *names, "cat", "x", "CAT."])
    assert str(raised.value) == (
        "the vocabulary holds the same word twice: 'Cat' and 'cat' (words 0 and 13), 'Cat' and 'CAT.' (words 0 and 15). "
        "Remove one of each pair."
    )
    with pytest.raises(UsageError, match=r"'word 9' and 'Word_9' \(words 9 and 21\), and 2 more. Remove") as raised:
        check_words([*names, *(name.replace("w", "W").replace(" ", "_") for name in names)])
    assert str(raised.value).count("(words ") == 10


def test_many_words_permute_and_count():
    names = [f"word {i}" for i in range(1203)]
    words = Vocabulary.build(names, LengthTeacher(), "single")
    assert len(words) == 1203 and words.num_base == 0
