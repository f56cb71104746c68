"""Data sets in COCO format: the OV-COCO facts, filtering, preparation, validated loading, registration."""

import copy
import json
import os
import runpy
import sys
import uuid
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

import ovdet2.data.datasets  # noqa: F401  (registers the data sets)
from ovdet2.data.datasets.coco_json import Split, filter_coco_json, load_ov_json
from ovdet2.data.datasets.prepare import prepare_split
from ovdet2.data.datasets.register import data_root, register_dataset, split_of
from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import sha256_file

REPOSITORY = Path(__file__).parents[1]
COCO_MINI = REPOSITORY.parent / "shared" / "data" / "coco_mini"
needs_coco_mini = pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs ../shared/data/coco_mini")

FRUIT = Split("fruit", base=((4, "pear"), (2, "apple")), novel=((3, "quince"),))


def fruit_json():
    """Three images; ids are sparse and the lists are in no order."""
    return {
        "categories": [{"id": 3, "name": "quince"}, {"id": 2, "name": "apple"}, {"id": 4, "name": "pear"}],
        "images": [
            {"id": 9, "file_name": "b/9.jpg", "width": 64, "height": 48},
            {"id": 5, "file_name": "5.jpg", "width": 50, "height": 50},
            {"id": 7, "file_name": "7.jpg", "width": 50, "height": 50},
        ],
        "annotations": [
            {"id": 11, "image_id": 9, "category_id": 4, "bbox": [1, 2, 30, 20], "iscrowd": 0},
            {"id": 12, "image_id": 5, "category_id": 3, "bbox": [0, 0, 50, 50], "iscrowd": 0},
            {"id": 10, "image_id": 5, "category_id": 2, "bbox": [4.5, 4, 9, 9], "iscrowd": 1},
        ],
    }


def write(folder, data):
    path = Path(folder) / f"{uuid.uuid4().hex}.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def name():
    """A data set name of this test alone, removed afterwards."""
    name = f"test_{uuid.uuid4().hex}"
    yield name
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)


# --- the split -------------------------------------------------------------------------------------------------


def test_ov_coco_has_48_base_17_novel_15_unused_classes_of_80():
    assert (len(OV_COCO.base), len(OV_COCO.novel), len(OV_COCO_UNUSED)) == (48, 17, 15)
    everything = OV_COCO.base + OV_COCO.novel + OV_COCO_UNUSED
    assert len({category_id for category_id, _ in everything}) == len({name for _, name in everything}) == 80


@needs_coco_mini
def test_ov_coco_ids_and_names_are_those_of_coco():
    data = json.loads((COCO_MINI / "annotations" / "instances_val2017.json").read_text())
    of_coco = {category["id"]: category["name"] for category in data["categories"]}
    assert dict(OV_COCO.base + OV_COCO.novel + OV_COCO_UNUSED) == of_coco


def test_contiguous_ids_are_base_first():
    assert FRUIT.names == ("pear", "apple", "quince")
    assert FRUIT.category_ids == (4, 2, 3)
    assert FRUIT.base_mask == (True, True, False)
    assert FRUIT.id_to_contiguous == {4: 0, 2: 1, 3: 2}


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"base": ()}, "no class"),
        ({"base": ((1, "a"), (1, "b"))}, "1 twice"),
        ({"base": ((1, "a"),), "novel": ((2, "a"),)}, "a twice"),
        ({"base": ((1, "a"),), "groups": {"g": (8,)}}, "8"),
    ],
)
def test_impossible_splits_are_refused(arguments, named):
    with pytest.raises(UsageError, match=named):
        Split("s", **arguments)


# --- filtering and preparing -------------------------------------------------------------------------------------


def test_filter_keeps_wanted_categories_crowds_and_annotated_images():
    data = fruit_json()
    before = copy.deepcopy(data)
    filtered, report = filter_coco_json(data, (2, 4))
    assert data == before
    assert {annotation["id"] for annotation in filtered["annotations"]} == {11, 10}
    assert {image["id"] for image in filtered["images"]} == {9, 5}
    assert {category["id"] for category in filtered["categories"]} == {2, 4}
    assert (report["images"], report["annotations"], report["crowds"], report["degenerate"]) == (2, 2, 1, [])
    assert len(filter_coco_json(data, (2, 4), keep_images="all")[0]["images"]) == 3


def test_filter_drops_and_lists_boxes_without_area():
    data = fruit_json()
    data["annotations"][0]["bbox"][3] = 0.0
    filtered, report = filter_coco_json(data, (2, 3, 4))
    assert report["degenerate"] == [11]
    assert {image["id"] for image in filtered["images"]} == {5}


def test_filter_refuses_a_file_of_another_numbering():
    with pytest.raises(DataError, match="no category 44"):
        filter_coco_json(fruit_json(), (2, 44))
    with pytest.raises(UsageError, match="keep_images"):
        filter_coco_json(fruit_json(), (2,), keep_images="some")


@settings(max_examples=30, deadline=None)
@given(st.sets(st.sampled_from([2, 3, 4]), min_size=1), st.permutations(range(3)))
def test_filtering_twice_or_in_another_order_changes_nothing(wanted, order):
    data = fruit_json()
    once, _ = filter_coco_json(data, wanted)
    assert filter_coco_json(once, wanted)[0] == once
    shuffled = {**data, "categories": [data["categories"][i] for i in order]}
    shuffled["images"] = [data["images"][i] for i in order]
    again, _ = filter_coco_json(shuffled, wanted)
    assert {image["id"] for image in again["images"]} == {image["id"] for image in once["images"]}
    assert again["annotations"] == once["annotations"]


@pytest.fixture
def coco_mini(tmp_path):
    """The root of a COCO folder whose image folders are symbolic links."""
    if not COCO_MINI.is_dir():
        pytest.skip("needs ../shared/data/coco_mini")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for name in ("instances_train2017.json", "instances_val2017.json"):
        os.symlink(COCO_MINI / "annotations" / name, tmp_path / "coco" / "annotations" / name)
    for name in ("train2017", "val2017"):
        os.symlink(COCO_MINI / name, tmp_path / "coco" / name)
    return tmp_path / "coco"


def test_prepared_coco_mini_loads_with_the_known_counts_and_no_novel_box_in_training(coco_mini, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco_mini.parent))
    for _ in prepare_split(coco_mini / "annotations", "ov_coco", OV_COCO):
        pass
    train, val = DatasetCatalog.get("ov_coco_train_base"), DatasetCatalog.get("ov_coco_val_all")
    in_train = [annotation["category_id"] for record in train for annotation in record["annotations"]]
    in_val = [annotation["category_id"] for record in val for annotation in record["annotations"]]
    assert (len(train), len(in_train)) == (60, 339)
    assert (len(val), len(in_val), sum(category >= 48 for category in in_val)) == (38, 328, 73)
    assert max(in_train) < 48
    assert any(annotation["iscrowd"] for record in train for annotation in record["annotations"])
    assert all(Path(record["file_name"]).is_file() for record in train + val)
    assert MetadataCatalog.get("ov_coco_val_all").image_root == str(coco_mini / "val2017")


def test_preparing_again_rewrites_nothing_and_mends_a_damaged_file(coco_mini):
    annotations = coco_mini / "annotations"
    first = {path: (sha256_file(path), path.stat().st_mtime_ns) for path, _ in prepare_split(annotations, "x", OV_COCO)}
    for path, report in prepare_split(annotations, "x", OV_COCO):
        assert not report["written"]
        assert (sha256_file(path), path.stat().st_mtime_ns) == first[path]
    damaged = next(iter(first))
    damaged.write_text(damaged.read_text()[:1000])
    assert [report["written"] for _, report in prepare_split(annotations, "x", OV_COCO)] == [True, False]
    assert sha256_file(damaged) == first[damaged][0]
    assert not list(annotations.glob(".*tmp"))


def test_an_unfiltered_json_is_refused_for_training(coco_mini):
    official = json.loads((coco_mini / "annotations" / "instances_val2017.json").read_text())
    val, _ = filter_coco_json(official, OV_COCO.category_ids)
    path = write(coco_mini, val)
    assert len(load_ov_json(path, coco_mini, OV_COCO)) == 38
    with pytest.raises(DataError, match="73 annotations of novel classes"):
        load_ov_json(path, coco_mini, OV_COCO, base_only=True)


def test_preparation_script(coco_mini, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_ov_coco.py", *map(str, arguments)])
        runpy.run_path(str(REPOSITORY / "datasets" / "prepare_ov_coco.py"), run_name="__main__")

    run("--root", coco_mini)
    printed = capsys.readouterr().out
    assert "60 images, 339 annotations" in printed and "38 images, 328 annotations" in printed
    assert "not the official file: 64 images" in printed
    with pytest.raises(SystemExit) as ended:
        run("--json", coco_mini / "nowhere")
    assert ended.value.code == 3
    complaint = capsys.readouterr().err
    assert "nowhere" in complaint and "download" in complaint


# --- loading ------------------------------------------------------------------------------------------------------


def test_loading_gives_detectron2_records_by_image_id(tmp_path):
    records = load_ov_json(write(tmp_path, fruit_json()), "images", FRUIT)
    assert [record["image_id"] for record in records] == [5, 7, 9]
    assert records[2]["file_name"] == os.path.join("images", "b/9.jpg")
    assert (records[2]["height"], records[2]["width"]) == (48, 64)
    assert [annotation["category_id"] for annotation in records[0]["annotations"]] == [2, 1]
    assert [annotation["iscrowd"] for annotation in records[0]["annotations"]] == [0, 1]
    assert records[0]["annotations"][1]["bbox"] == [4.5, 4, 9, 9]


def test_loaded_boxes_equal_those_of_detectron2s_own_reader(tmp_path):
    from detectron2.data.datasets.coco import load_coco_json

    path = write(tmp_path, fruit_json())
    ours, theirs = load_ov_json(path, "images", FRUIT), load_coco_json(str(path), "images")
    for record in theirs:
        for annotation in record["annotations"]:
            annotation["category_id"] = FRUIT.id_to_contiguous[annotation["category_id"]]
    for record in ours:
        for annotation in record["annotations"]:
            del (
                annotation["id"],
                annotation["area"],
            )  # Detectron2's reader drops them; leak checks and evaluators need them
    assert ours == theirs


def _annotation(key, value):
    return lambda data: data["annotations"][0].__setitem__(key, value)


def _image(key, value):
    return lambda data: data["images"][0].__setitem__(key, value)


BAD = {
    "box of zero width": (_annotation("bbox", [1, 1, 0, 5]), "zero or negative size, annotation id 11"),
    "box of negative height": (_annotation("bbox", [9, 9, 5, -4]), "zero or negative size, annotation id 11"),
    "box with nan": (_annotation("bbox", [float("nan"), 1, 5, 5]), "not finite, annotation id 11"),
    "empty box": (_annotation("bbox", []), "not four numbers, annotation id 11"),
    "box of a huge number": (_annotation("bbox", [1, 1, 10**400, 5]), "not finite, annotation id 11"),
    "box of booleans": (_annotation("bbox", [1, 1, True, 5]), "not finite, annotation id 11"),
    "box outside": (_annotation("bbox", [70, 1, 5, 5]), "outside of their image, annotation id 11"),
    "no box": (lambda data: data["annotations"][0].pop("bbox"), "not four numbers, annotation id 11"),
    "unknown category": (_annotation("category_id", 77), r"outside of the split fruit, id 11 \(category 77\)"),
    "category id a list": (_annotation("category_id", [4]), r"outside of the split fruit, id 11 \(category \[4\]\)"),
    "category id of digits": (_annotation("category_id", "4"), r"id 11 \(category '4'\): convert ids given as text"),
    "image id a float": (_annotation("image_id", 9.0), "not in the file, id 11: convert ids given as text"),
    "image id a list": (_annotation("image_id", [9]), "image that is not in the file, id 11"),
    "annotation id a list": (_annotation("id", [11]), r"without an integer id or with a repeated one, id \[11\]"),
    "crowd of text": (_annotation("iscrowd", "no"), "neither 0 nor 1, id 11"),
    "duplicate annotation": (_annotation("id", 12), "repeated one, id 12"),
    "unknown image": (_annotation("image_id", 1234), "image that is not in the file, id 11"),
    "no image id": (lambda data: data["annotations"][0].pop("image_id"), "image that is not in the file, id 11"),
    "image without id": (lambda data: data["images"][0].pop("id"), "integer id, file name 'b/9.jpg'"),
    "duplicate image": (_image("id", 5), "images listed twice, id 5"),
    "no width": (lambda data: data["images"][0].pop("width"), "without positive width and height, id 9"),
    "infinite width": (_image("width", float("inf")), "without positive width and height, id 9"),
    "zero height": (_image("height", 0), "without positive width and height, id 9"),
    "no file name": (lambda data: data["images"][0].pop("file_name"), "without file_name, id 9"),
    "absolute file name": (
        _image("file_name", "/etc/passwd"),
        r"outside of the image folder, image id 9 \('/etc/passwd'\)",
    ),
    "escaping file name": (_image("file_name", "../../x"), r"outside of the image folder, image id 9 \('../../x'\)"),
    "hidden escape": (_image("file_name", "a/../../x"), "outside of the image folder"),
    "no images": (lambda data: data.__setitem__("images", []), "has no images"),
    "no annotations list": (lambda data: data.pop("annotations"), "no list 'annotations'"),
    "another numbering": (lambda data: data["categories"][1].update(name="pear"), r"id 2 \('pear' for 'apple'\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_are_refused_by_id(case, tmp_path):
    spoil, named = BAD[case]
    data = fruit_json()
    spoil(data)
    path = write(tmp_path, data)
    with pytest.raises(DataError, match=named) as caught:
        load_ov_json(path, tmp_path, FRUIT)
    assert str(path) in str(caught.value)


def test_many_faults_are_counted_and_the_first_ids_named(tmp_path):
    data = fruit_json()
    data["annotations"] = [
        {"id": number, "image_id": 5, "category_id": 2, "bbox": [0, 0, 0, 0]} for number in range(100, 120)
    ]
    with pytest.raises(DataError, match=r"20 boxes of zero .* annotation id 100, 101, 102, 103, 104, \.\.\.:"):
        load_ov_json(write(tmp_path, data), tmp_path, FRUIT)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match="absent.json does not exist"):
        load_ov_json(tmp_path / "absent.json", tmp_path, FRUIT)
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps(fruit_json())[:80])
    with pytest.raises(DataError, match="cut.json is not valid JSON"):
        load_ov_json(cut, tmp_path, FRUIT)
    with pytest.raises(DataError, match="no list 'images'"):
        load_ov_json(write(tmp_path, [1, 2]), tmp_path, FRUIT)


boxes = st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.integers(-9, 60) | st.none(), max_size=5)


@settings(max_examples=60, deadline=None)
@given(boxes, st.sampled_from([2, 3, 4, 5, None]), st.sampled_from([5, 7, 9, 1, None]), st.text(max_size=6))
def test_whatever_is_loaded_is_valid(tmp_path_factory, box, category_id, image_id, file_name):
    data = fruit_json()
    data["annotations"].append({"id": 99, "image_id": image_id, "category_id": category_id, "bbox": box})
    data["images"][1]["file_name"] = file_name
    try:
        records = load_ov_json(write(tmp_path_factory.getbasetemp(), data), "images", FRUIT)
    except DataError:
        return
    for record in records:
        assert os.path.normpath(record["file_name"]).startswith("images")
        for annotation in record["annotations"]:
            x, y, width, height = annotation["bbox"]
            assert width > 0 and height > 0 and x < record["width"] and y < record["height"]
            assert 0 <= annotation["category_id"] < 3


# --- registration -------------------------------------------------------------------------------------------------


def test_own_data_below_the_data_root(name, tmp_path, monkeypatch):
    register_dataset(name, "fruit/test.json", "fruit/images", FRUIT)
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["pear", "apple", "quince"]
    assert metadata.thing_dataset_id_to_contiguous_id == {4: 0, 2: 1, 3: 2}
    assert (metadata.evaluator_type, split_of(name)) == ("ov_coco", FRUIT)
    # The data root counts at the time of loading, and may change.
    for root in (tmp_path / "one", tmp_path / "two"):
        (root / "fruit" / "images").mkdir(parents=True)
        (root / "fruit" / "test.json").write_text(json.dumps(fruit_json()))
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        assert data_root() == root
        assert DatasetCatalog.get(name)[0]["file_name"] == str(root / "fruit" / "images" / "5.jpg")
        assert MetadataCatalog.get(name).json_file == str(root / "fruit" / "test.json")


def test_a_missing_data_set_names_the_path_and_the_remedy(name, tmp_path):
    register_dataset(name, tmp_path / "a.json", tmp_path, FRUIT, remedy="run make_fruit.py")
    with pytest.raises(DataError, match=r"a\.json does not exist.*run make_fruit\.py"):
        DatasetCatalog.get(name)


def test_missing_coco_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DataError, match=r"ov_coco_train_base\.json does not exist.*ovdet2 dataset prepare ov-coco"):
        DatasetCatalog.get("ov_coco_train_base")


def test_prepare_runs_before_each_load_and_not_at_registration(name, tmp_path):
    calls = []

    def prepare():
        calls.append(1)
        (tmp_path / "made.json").write_text(json.dumps(fruit_json()))

    register_dataset(name, lambda: tmp_path / "made.json", lambda: tmp_path, FRUIT, prepare=prepare)
    assert not calls
    assert len(DatasetCatalog.get(name)) == len(DatasetCatalog.get(name)) == 3
    assert len(calls) == 2


def test_a_name_is_registered_once(name, tmp_path):
    register_dataset(name, "a.json", "a", FRUIT)
    with pytest.raises(UsageError, match=name):
        register_dataset(name, "a.json", "a", FRUIT)
