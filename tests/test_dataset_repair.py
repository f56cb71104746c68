"""The repair loses nothing that converts, says when most of a file would go, and never clips boxes of another form."""

import copy
import json
from pathlib import Path

import pytest
from PIL import Image

from ovdet2.data.datasets.check import check, problems
from ovdet2.data.datasets.coco_json import Split, load_ov_json
from ovdet2.data.datasets.repair import losses, repair
from ovdet2.io.files import read_json
from ovdet2.programs.check_dataset import main

CASES = Path(__file__).parent / "cases"
IMAGES = CASES / "images"
FRUIT = Split("fruit", ((1, "plum"), (2, "lime"), (3, "fig")))


@pytest.fixture
def data():
    value = read_json(CASES / "13-image-size-fields" / "float.json")
    assert problems(check(value, "float.json", IMAGES)) == []
    return value


def change(data, key, field, form):
    for record in data[key]:
        record[field] = form(record[field])


def flat(polygons):
    return polygons[0]


def points(polygon):
    return [list(point) for point in zip(polygon[::2], polygon[1::2])]


CONVERTED = {
    "category ids of digits": [("categories", "id", str), ("annotations", "category_id", str)],
    "image ids of digits": [("images", "id", str), ("annotations", "image_id", str)],
    "image ids of text": [("images", "id", "img_{}".format), ("annotations", "image_id", "img_{}".format)],
    "image ids above 64 bits": [
        ("images", "id", lambda number: str(number + 2**70)),
        ("annotations", "image_id", lambda number: number + 2**70),
    ],
    "category ids of text": [("categories", "id", "no. {}".format), ("annotations", "category_id", "no. {}".format)],
    "image ids of floats": [("images", "id", float), ("annotations", "image_id", float)],
    "only the references are text": [("annotations", "image_id", str), ("annotations", "category_id", str)],
    "annotation ids of digits": [("annotations", "id", "{:.0f}".format)],
    "boxes of digits": [("annotations", "bbox", lambda box: [str(value) for value in box])],
    "boxes of digits and spaces": [("annotations", "bbox", lambda box: [f" {value:.3f} " for value in box])],
    "crowds null": [("annotations", "iscrowd", lambda _: None)],
    "crowds of digits": [("annotations", "iscrowd", str)],
    "crowds of words": [("annotations", "iscrowd", lambda _: "false")],
    "areas of digits": [("annotations", "area", str)],
    "sizes of digits": [("images", "width", lambda side: f"{side:.0f}"), ("images", "height", str)],
    "flat polygons": [("annotations", "segmentation", flat)],
    "polygons of points": [("annotations", "segmentation", lambda value: points(value[0]))],
    "lists of polygons of points": [("annotations", "segmentation", lambda value: [points(value[0])])],
    "flat polygons of digits": [("annotations", "segmentation", lambda value: list(map(str, flat(value))))],
}


@pytest.mark.parametrize("case", CONVERTED)
def test_what_converts_without_loss_is_kept(case, data, tmp_path, capsys):
    expected = load_ov_json_of(data, tmp_path, masks=True)
    for key, field, form in CONVERTED[case]:
        change(data, key, field, form)
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data))
    out = tmp_path / "out.json"
    arguments = ["--json", str(path), "--images", str(IMAGES), "--masks", "--workers", "1"]
    assert main(arguments) == 3 and main([*arguments, "--fix", str(out)]) == 0
    assert "of 36 annotations" not in capsys.readouterr().out
    assert load_ov_json(out, IMAGES, FRUIT, masks=True) == expected


def load_ov_json_of(data, folder, **options):
    path = folder / "data.json"
    path.write_text(json.dumps(data))
    return load_ov_json(path, IMAGES, FRUIT, **options)


OPTIONAL = {
    "flat polygon of four": ("segmentation", lambda _: [1, 2, 3, 4], None),
    "polygon of four": ("segmentation", lambda _: [[1, 2, 30, 40]], None),
    "code of another size": ("segmentation", lambda _: {"size": [9, 9], "counts": [81]}, None),
    "code of another length": ("segmentation", lambda _: {"size": [120, 160], "counts": [5]}, None),
    "code of negative runs": ("segmentation", lambda _: {"size": [120, 160], "counts": [-5, 19205]}, None),
    "empty segmentation": ("segmentation", lambda _: [], []),
    "segmentation of text": ("segmentation", lambda _: "polygon", None),
    "segmentation of a number": ("segmentation", lambda _: 7, None),
    "crowd of two": ("iscrowd", lambda _: 2, None),
    "area negative": ("area", lambda _: -1, "area of the box"),
    "area of text": ("area", lambda _: "large", "area of the box"),
    "area infinite": ("area", lambda _: float("inf"), "area of the box"),
}


@pytest.mark.parametrize("case", OPTIONAL)
def test_an_odd_optional_field_costs_the_field(case, data):
    field, form, left = OPTIONAL[case]
    before = copy.deepcopy(data["annotations"])
    change(data, "annotations", field, form)
    repaired, _ = repair(data, check(data, "odd.json", IMAGES), IMAGES)
    for old, new in zip(before, repaired["annotations"], strict=True):
        if left == "area of the box":
            assert new["area"] == old["bbox"][2] * old["bbox"][3]
        else:
            assert new.get(field) == left and (left is not None or field not in new)
        assert {**new, field: 0} == {**old, field: 0}
    assert problems(check(repaired, "fixed.json", IMAGES)) == []


@pytest.mark.parametrize("name", ["missing", "text", "float"])
def test_image_sizes_come_from_the_files(name, tmp_path):
    path, out = CASES / "13-image-size-fields" / f"{name}.json", tmp_path / "out.json"
    assert main(["--json", str(path), "--images", str(IMAGES), "--fix", str(out), "--workers", "1"]) == 0
    for records in (load_ov_json(out, IMAGES, FRUIT), load_ov_json(path, IMAGES, FRUIT)):  # of the file as it is, too
        assert {(record["width"], record["height"]) for record in records} == {(160, 120)}
        assert all(type(record["width"]) is int for record in records)
        assert sum(len(record["annotations"]) for record in records) == 36


def test_sizes_that_need_the_image_files_ask_for_the_folder(tmp_path, capsys):
    path, out = CASES / "13-image-size-fields" / "missing.json", tmp_path / "out.json"
    assert main(["--json", str(path), "--fix", str(out)]) == 3
    assert "add --images FOLDER" in capsys.readouterr().out
    assert len(read_json(out)["annotations"]) == 36


def test_boxes_are_checked_against_the_size_in_the_header(data):
    """Without a stated size a box outside of its image would pass until the size is known."""
    del data["images"][0]["width"]
    data["annotations"][0]["bbox"] = [158, 10, 20, 20]
    found = problems(check(data, "x.json", IMAGES))
    assert [finding.kind for finding in found] == ["image-size", "box-partly-outside"]
    repaired, _ = repair(data, found, IMAGES)
    assert repaired["annotations"][0]["bbox"] == [158, 10, 2, 20]
    assert [finding.kind for finding in problems(check(data, "x.json"))] == ["image-size"]
    assert [finding.kind for finding in problems(check(repair(data, check(data, "x"))[0], "x"))] == ["image-size"]


def test_most_of_a_class_or_of_the_file_does_not_go_in_silence(data, tmp_path, capsys):
    for box in data["annotations"]:
        if box["category_id"] == 2:
            box["bbox"] = [5, 5, -3, 4]
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(data))
    lime = sum(box["category_id"] == 2 for box in data["annotations"])
    assert main(["--json", str(path), "--fix", str(tmp_path / "out.json")]) == 3
    printed = capsys.readouterr().out
    assert f"most was removed, 0 of {lime} annotations of category 2 ('lime') left." in printed
    assert "Left, because a repair would be a guess: problems: 0" in printed
    change(data, "annotations", "image_id", lambda number: number + 100)
    repaired, _ = repair(data, check(data, "x"))
    assert losses(data, repaired, check(data, "x"))[0] == "0 of 36 annotations left"


def test_a_record_that_stands_twice_is_no_loss(data, tmp_path):
    data["annotations"] += [dict(box) for box in data["annotations"]] * 3
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(data))
    assert main(["--json", str(path), "--fix", str(tmp_path / "out.json")]) == 0
    assert len(read_json(tmp_path / "out.json")["annotations"]) == 36


@pytest.mark.parametrize("name, kind", [("train", "suspected-shares"), ("train_centres", "suspected-centres")])
def test_boxes_of_another_form_are_suspected_and_never_clipped(name, kind, tmp_path, capsys):
    path, out = CASES / "10-boxes-as-shares" / f"{name}.json", tmp_path / "out.json"
    assert main(["--json", str(path), "--images", str(IMAGES), "--fix", str(out), "--workers", "1"]) == 3
    printed = capsys.readouterr().out
    assert f"{kind}, 1:" in printed and "; annotations " in printed
    assert read_json(out)["annotations"] == read_json(path)["annotations"]


def as_form(box, form, width=160, height=120):
    x, y, w, h = box
    return {
        "corner shares": [x / width, y / height, (x + w) / width, (y + h) / height],
        "centre shares": [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height],
        "shares a little above 1": [x / width, y / height, 1.02 * w / width, 1.02 * h / height],
        "corners": [x, y, x + w, y + h],
        "centres": [x + w / 2, y + h / 2, w, h],
        "pixels": box,
    }[form]


@pytest.mark.parametrize(
    "form, kind",
    [
        ("corner shares", "shares"),
        ("centre shares", "shares"),
        ("shares a little above 1", "shares"),
        ("corners", "xyxy"),
        ("centres", "centres"),
        ("pixels", None),
    ],
)
def test_each_form_of_boxes_raises_its_suspicion_only(form, kind, data):
    change(data, "annotations", "bbox", lambda box: as_form(box, form))
    found = check(data, "x.json")
    suspected = [finding.kind for finding in found if finding.kind.startswith("suspected")]
    assert suspected == ([] if kind is None else [f"suspected-{kind}"])
    repaired, _ = repair(data, found)
    assert [box["bbox"] for box in repaired["annotations"]] == [box["bbox"] for box in data["annotations"]]


def test_shares_are_suspected_without_image_sizes(data):
    change(data, "annotations", "bbox", lambda box: as_form(box, "corner shares"))
    for image in data["images"]:
        del image["width"]
    assert "suspected-shares" in {finding.kind for finding in check(data, "x.json")}


def test_three_boxes_are_enough_to_suspect_shares(data):
    data["annotations"] = data["annotations"][:3]
    change(data, "annotations", "bbox", lambda box: as_form(box, "centre shares"))
    assert "suspected-shares" in {finding.kind for finding in check(data, "x.json")}


def notes(data):
    return [(f.kind, f.where, f.detail) for f in check(data, "x.json") if f.kind != "image-without-annotations"]


def test_equal_words_are_named_by_id_and_an_unused_heading_is_a_note():
    folder = CASES / "05-root-category-of-the-same-name"
    assert notes(read_json(folder / "train.json")) == [("category-root", "category 0", "name 'fruit'")]
    assert notes(read_json(folder / "train_case.json")) == [("category-root", "category 0", "name 'Fruit'")]
    twice = ("category-name-twice", "category 2", "'plum', category 1 is 'Plum'")
    assert notes(read_json(folder / "train_two_cases.json")) == [twice]
    used = read_json(folder / "train.json")
    used["annotations"][0]["category_id"] = 0
    assert notes(used) == [("category-name-twice", "category 1", "'fruit', category 0 is 'fruit'")]


def test_names_that_are_numbers_become_text(tmp_path):
    path, out = CASES / "06-names-that-yaml-converts" / "train_int.json", tmp_path / "out.json"
    assert main(["--json", str(path), "--fix", str(out)]) == 0
    split = Split("numbers", ((1, "0"), (2, "1"), (3, "2")))
    assert sum(len(record["annotations"]) for record in load_ov_json(out, IMAGES, split)) == 36


def test_notes_for_repeated_files_and_boxes_and_for_classes_of_crowds(data):
    data["images"].append({**data["images"][0], "id": 50})
    data["annotations"].append({**data["annotations"][0], "id": 99})
    change(data, "annotations", "iscrowd", lambda _: 0)
    of_fig = [box for box in data["annotations"] if box["category_id"] == 3]
    for box in of_fig[:-1]:
        box["iscrowd"] = 1
    first = data["annotations"][0]
    assert notes(data) == [
        ("image-same-file", "image 50", f"{data['images'][0]['file_name']!r}, of image 1"),
        ("category-mostly-crowds", "category 3", f"{len(of_fig) - 1} of {len(of_fig)} annotations"),
        ("box-twice", "annotation 99", f"{first['bbox']}, of annotation {first['id']}"),
    ]
    assert problems(check(data, "x.json")) == []


def test_ignored_objects_do_not_count_as_objects(data, tmp_path):
    for number, box in enumerate(data["annotations"]):
        box |= {"ignore": number % 2, "iscrowd": 0}
    boxes = [box for record in load_ov_json_of(data, tmp_path) for box in record["annotations"]]
    assert sum(box["iscrowd"] for box in boxes) == sum(box.get("difficult", False) for box in boxes) == 18


def test_backslashes_are_written_as_slashes(data, tmp_path):
    folder = tmp_path / "images" / "a" / "b"
    folder.mkdir(parents=True)
    for image in data["images"]:
        Image.open(IMAGES / image["file_name"]).save(folder / image["file_name"])
        image["file_name"] = f"a\\b\\{image['file_name']}"
    path, out = tmp_path / "odd.json", tmp_path / "out.json"
    path.write_text(json.dumps(data))
    assert main(["--json", str(path), "--images", str(tmp_path / "images"), "--fix", str(out), "--workers", "1"]) == 0
    assert len(load_ov_json(out, tmp_path / "images", FRUIT)) == 12
    assert read_json(out)["images"][0]["file_name"] == "a/b/img_001.png"
