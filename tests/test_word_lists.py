"""Lists of words: public data sets by name, annotation files, lists and files of one's own."""

import csv
import json
from pathlib import Path

import pytest

from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.data.datasets.words import words_of_dataset
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_json
from ovdet2.vocabulary import check_words, parse_words, read_words
from ovdet2.vocabulary.word_lists import NAMED, WordList, named_words, words_of_json
from tests.vocabulary_cases import (
    CLIP_TEXT,
    needs_shared,
    write_lvis,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def lvis_root(tmp_path, monkeypatch):
    write_lvis(monkeypatch, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name, count, known",
    [
        ("coco", 80, {1: "person", 13: "stop sign", 90: "toothbrush"}),
        ("lvis", 1203, {1: "aerosol_can", 3: "airplane", 1203: "zucchini"}),
        ("objects365_v1", 365, {1: "person", 48: "toy", 159: "tissue ", 247: "CD", 365: "flashlight"}),
        ("objects365_v2", 365, {1: "Person", 4: "Other Shoes", 38: "Moniter/TV", 365: "Table Tennis "}),
        ("voc", 20, {1: "aeroplane", 11: "dining table", 20: "tv monitor"}),
        (
            "openimages",
            601,
            {
                "/m/011k07": "Tortoise",
                "/m/01g317": "Person",
                "/m/09f20": "Hippopotamus",
                "/m/09f_2": "Crocodile",
                "/m/0zvk5": "Helmet",
            },
        ),
        (
            "openimages_challenge",
            500,
            {1: "Infant bed", 9: "Crocodile", 15: "Training bench", 72: "Bench", 500: "Toilet"},
        ),
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
    assert {path.stem for path in files} == set(NAMED) - {"coco", "lvis"}
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


def test_words_in_text_and_files(tmp_path):
    assert read_words("cat, red mug ,").names == ("cat", "red mug") and read_words("cat").synonyms is None
    assert read_words("cat\nred mug").names == ("cat", "red mug")
    inline = read_words("sofa; couch; settee , cat;")
    assert inline.names == ("sofa", "cat") and inline.synonyms == (("couch", "settee"), ())
    (tmp_path / "w.txt").write_text("\ufeffsofa; couch # furniture\n\ncat\n", encoding="utf-8")
    assert read_words(tmp_path / "w.txt") == WordList(("sofa", "cat"), synonyms=(("couch",), ()))
    write_json(tmp_path / "w.json", {"sofa": ["couch"], "cat": []})
    assert read_words(tmp_path / "w.json") == read_words(str(tmp_path / "w.txt"))
    (tmp_path / "w.json").write_text('\ufeff["sofa", "a, b"]', encoding="utf-8")
    assert read_words(tmp_path / "w.json").names == ("sofa", "a, b")  # entries are not split
    (tmp_path / "a, b.txt").write_text("sofa\n", encoding="utf-8")
    assert read_words(str(tmp_path / "a, b.txt")).names == ("sofa",)
    assert len(read_words("st. bernard, " + "very long word " * 40).names) == 2
    assert len(read_words("long word " * 400).names) == 1  # longer than a path may be
    assert read_words(f"{tmp_path / 'words'},").names == (str(tmp_path / "words"),)
    for name in ("st. bernard", "Mt. Fuji.", "U.S. flag", "a cat."):
        assert read_words(name).names == (name,)
    assert read_words("cafe\u0301").names == ("caf\u00e9",)


def test_words_as_python_objects():
    assert read_words(["cat", "a, b"]) == WordList(("cat", "a, b"))
    assert read_words({"sofa": ["couch"], "cat": ()}) == WordList(("sofa", "cat"), synonyms=(("couch",), ()))
    assert read_words(name for name in ("cat", "dog")).names == ("cat", "dog")
    assert parse_words("cat, dog") == ["cat", "dog"]
    with pytest.raises(UsageError, match="'sofa' has the synonym 'couch', but synonyms are not used here"):
        parse_words("cat, sofa; couch")


@pytest.mark.parametrize("value", (7, None, b"cat", ["cat", 3], {"sofa": "couch"}, {"sofa": ["couch", None]}, {"a": 3}, [["a"]]))  # fmt: skip
def test_words_that_are_no_text(value, tmp_path):
    with pytest.raises(UsageError, match="the list of words holds .*: give a list of words or {word"):
        read_words(value)
    if not isinstance(value, bytes):
        write_json(tmp_path / "w.json", value)
        with pytest.raises(DataError, match="w.json holds .*: give a list of words or {word"):
            read_words(tmp_path / "w.json")


@pytest.mark.parametrize(
    "text",
    (
        "cat . dog",
        "cat. big dog.",
        "cat | dog",
        "cat|dog",
        "cat\uff0cdog",
        "cat\u3001dog",
        "cat\uff1bdog",
        "cat\tdog",
        "cat . a dog",
    ),
)
def test_a_word_that_seems_to_be_several(text):
    with pytest.raises(UsageError, match=".*dog.?' seems to be several words, joined by .*: separate words by commas"):
        read_words(text)
    assert read_words([text, "bird"]).names == (text, "bird")  # among others it may be a name


@pytest.mark.parametrize("text", ("cat, dog", "cat; dog", "cat\ndog"))
def test_a_list_of_one_joined_text(text):
    with pytest.raises(UsageError, match="seems to be several words, joined by .*: give each word as an entry of the"):
        read_words([text])


def test_prompts_of_sentences():
    """Other detectors take "a cat. a dog."; a name may have an abbreviation."""
    with pytest.raises(UsageError, match=r"seems to be several words, joined by '\.': separate words by commas"):
        read_words("a cat. a dog.")
    for name in ("St. Bernard", "cat.", "no. 5"):
        assert read_words(name).names == (name,)


@pytest.mark.parametrize("text", ("['cat', 'dog']", '["cat"]', "[cat, dog]", "{'cat': []}", '"cat", "dog"', "'cat'"))
def test_words_as_code_writes_them(text):
    with pytest.raises(UsageError, match="is written as code: give the words without brackets and quotation marks"):
        read_words(text)
    assert read_words("children's toy, 5'").names == ("children's toy", "5'")
    assert read_words(["[cat]", "'dog'"]).names == ("[cat]", "'dog'")  # as entries they are names


@pytest.mark.parametrize("odd", ("\0", "\x07", "\x1b", "\x7f", "\x9f", "\ud800"))
def test_control_characters(odd, tmp_path):
    for words in (f"cat, d{odd}og", ["cat", f"d{odd}og"], {"cat": [f"d{odd}og"]}):
        with pytest.raises(UsageError, match=rf"has the character U\+{ord(odd):04X}, which is no text"):
            read_words(words)
    if odd != "\ud800":
        (tmp_path / "w.txt").write_text(f"cat\nd{odd}og\n", encoding="utf-8")
        with pytest.raises(UsageError, match="has the character"):
            read_words(tmp_path / "w.txt")


def test_suffixes_in_capitals(tmp_path):
    (tmp_path / "W.TXT").write_text("sofa\ncat\n", encoding="utf-8")
    write_json(tmp_path / "W.Json", ["sofa", "cat"])
    for path in (tmp_path / "W.TXT", tmp_path / "W.Json"):
        assert read_words(path).names == read_words(str(path)).names == ("sofa", "cat")


def test_word_lists_that_cannot_be_read(tmp_path):
    for name in ("words", "words.lst"):
        (tmp_path / name).write_text("sofa\n", encoding="utf-8")
        with pytest.raises(UsageError, match=f"{name} is a file, not a word: words are read from a .txt file"):
            read_words(str(tmp_path / name))
        with pytest.raises(UsageError, match=f"{name} is no word list"):
            read_words(tmp_path / name)
    with pytest.raises(UsageError, match="is no word list"):
        read_words(tmp_path)
    for name in ("missing.txt", "missing.json"):
        with pytest.raises(DataError, match=f"{name} does not exist"):
            read_words(str(tmp_path / name))
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt cannot be read .*: give a UTF-8 file"):
        read_words(str(tmp_path / "latin.txt"))
    write_json(tmp_path / "w.json", {})
    with pytest.raises(DataError, match="w.json has no categories with id and name"):
        words_of_json(tmp_path / "w.json")


@pytest.mark.parametrize("names", (["\u200b"], ["cat", "\u200d \u2060"], ["cat", "\u00ad"]))
def test_invisible_words(names):
    with pytest.raises(UsageError, match=f"word {len(names) - 1} of the vocabulary is empty"):
        check_words(names)
    with pytest.raises(UsageError, match="twice: .* .words 0 and 1"):
        check_words(["caf\u00e9", "cafe\u0301"])


def test_words_of_a_data_set(lvis_root):
    words = words_of_dataset("ov_lvis_val", with_synonyms=True)
    assert words.names == ("cat", "sofa", "bull") and words.category_ids == (2, 4, 9)  # base first
    assert words.synonyms == ((), ("couch",), ("horned_cow",)) and list(words.base_mask) == [True, True, False]
    assert words_of_dataset("ov_lvis_val").synonyms is None
    by_id = words_of_json(lvis_root / "lvis" / "lvis_v1_val.json")
    assert by_id.names == words.names and by_id.synonyms == words.synonyms
    with pytest.raises(UsageError, match="'nothing' is not a registered"):
        words_of_dataset("nothing")
