"""Lists of words: public data sets by name, annotation files, lists and files of one's own."""

import csv
import json
from pathlib import Path

import pytest

from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.data.datasets.words import words_of_dataset
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_json
from ovdet2.vocabulary import check_words
from ovdet2.vocabulary.word_lists import NAMED, named_words, words_of_json, words_of_text
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
    (tmp_path / "w.lst").write_text("sofa\n", encoding="utf-8")
    with pytest.raises(UsageError, match="w.lst is a file, not a word"):
        words_of_text(tmp_path / "w.lst")
    with pytest.raises(DataError, match="w.json has no categories with id and name"):
        words_of_json(tmp_path / "w.json")


def test_words_of_a_data_set(lvis_root):
    words = words_of_dataset("ov_lvis_val", with_synonyms=True)
    assert words.names == ("cat", "sofa", "bull") and words.category_ids == (2, 4, 9)  # base first
    assert words.synonyms == ((), ("couch",), ("horned_cow",)) and list(words.base_mask) == [True, True, False]
    assert words_of_dataset("ov_lvis_val").synonyms is None
    by_id = words_of_json(lvis_root / "lvis" / "lvis_v1_val.json")
    assert by_id.names == words.names and by_id.synonyms == words.synonyms
    with pytest.raises(UsageError, match="'nothing' is not a registered"):
        words_of_dataset("nothing")
