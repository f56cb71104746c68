"""The dataset checker: every kind of problem by id, nothing read outside of the image root, the cleaned copy."""

import contextlib
import copy
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovdet2.data.datasets.check import check, check_json, problems
from ovdet2.data.datasets.coco_json import Split, load_ov_json
from ovdet2.data.datasets.conversion import as_integer, as_number
from ovdet2.data.datasets.findings import KINDS, NOTES
from ovdet2.data.datasets.repair import clip_box, repair
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_json, sha256_file
from ovdet2.io.images import image_size, read_image

REPOSITORY = Path(__file__).parents[1]
COCO_MINI = REPOSITORY.parent / "shared" / "data" / "coco_mini"
PROGRAM = REPOSITORY / "tools" / "check_dataset.py"
main = runpy.run_path(str(PROGRAM))["main"]

FRUIT = Split("fruit", base=((2, "apple"), (4, "pear")), novel=((7, "quince"),))
TURNED = "sub/Äpfel 猫.jpg"  # stored upright only by its EXIF orientation


def fruit_json():
    """Ids are sparse and the lists are in no order; image 9 is EXIF-rotated."""
    square = [[4, 4, 14, 4, 14, 14, 4, 14], [20, 4, 30, 4, 30, 14]]
    return {
        "categories": [{"id": 4, "name": "pear"}, {"id": 2, "name": "apple"}, {"id": 7, "name": "quince"}],
        "images": [
            {"id": 9, "file_name": TURNED, "width": 64, "height": 48},
            {"id": 5, "file_name": "5.png", "width": 50.0, "height": 40},
        ],
        "annotations": [
            {"id": 11, "image_id": 9, "category_id": 4, "bbox": [4, 4, 26, 10], "area": 150, "segmentation": square},
            {"id": 12, "image_id": 5, "category_id": 7, "bbox": [-0.5, 0, 51.3, 40], "iscrowd": 0, "segmentation": []},
            {
                "id": 10,
                "image_id": 5,
                "category_id": 2,
                "bbox": [4.5, 4, 9, 9],
                "area": 81.0,
                "iscrowd": 1,
                "segmentation": {"size": [40, 50], "counts": [1999, 1]},
            },
        ],
    }


def lvis_json():
    """The same as LVIS has it."""
    data = fruit_json()
    for category in data["categories"]:
        category["frequency"] = "r"
    for image, neg in zip(data["images"], ([2], [4])):
        image |= {"neg_category_ids": neg, "not_exhaustive_category_ids": [7]}
    del data["images"][0]["file_name"]
    data["images"][0]["coco_url"] = f"https://example.org/images/{TURNED}"
    return data


def masks_json():
    """The same, each annotation with a mask."""
    data = fruit_json()
    data["annotations"][1]["segmentation"] = [[1, 1, 40, 1, 40, 30]]
    return data


def write_images(folder):
    """The two images of :func:`fruit_json`."""
    (folder / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64), "red").save(folder / TURNED, exif=exif)
    Image.new("RGB", (50, 40), "green").save(folder / "5.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def write(folder, data, name="fruit.json"):
    path = folder / name
    path.write_text(json.dumps(data))
    return path


def places(findings):
    return [(finding.kind, finding.where) for finding in findings]


@pytest.mark.parametrize("make", [fruit_json, lvis_json])
@pytest.mark.parametrize("options", [[], ["--decode"]])
def test_a_clean_file_passes(make, options, images, tmp_path, capsys):
    path = write(tmp_path, make())
    assert main(["--json", str(path), "--images", str(images), *options]) == 0
    assert "problems: 0, notes: 0" in capsys.readouterr().out


# --- every kind of problem -----------------------------------------------------------------------------------------


def annotation(**fields):
    """Changes fields of annotation 11."""
    return lambda data, folder: data["annotations"][0].update(fields)


def image(**fields):
    """Changes fields of image 9."""
    return lambda data, folder: data["images"][0].update(fields)


def category(**fields):
    """Changes fields of category 4."""
    return lambda data, folder: data["categories"][0].update(fields)


def without(key, field):
    return lambda data, folder: data[key][0].pop(field)


def again(key, **fields):
    """Appends the first record once more, with other fields."""
    return lambda data, folder: data[key].append({**data[key][0], **fields})


def append(key, value):
    return lambda data, folder: data[key].append(value)


def file(spoil):
    """Spoils the file of image 9."""
    return lambda data, folder: spoil(folder / TURNED)


def boxes_as(convert):
    """Twelve annotations, their (x1, y1, x2, y2) converted."""

    def spoil(data, folder):
        corners = [(21 + number, 14 + number, 45 + number, 35 + number) for number in range(12)]
        data["annotations"] = [
            {"id": 20 + number, "image_id": 9, "category_id": 4, "bbox": list(convert(*corner))}
            for number, corner in enumerate(corners)
        ]
        data["annotations"].append({"id": 12, "image_id": 5, "category_id": 4, "bbox": [1, 1, 9, 9]})

    return spoil


def category_ids(known, used):
    """Twelve annotations of the used ids in turn."""

    def spoil(data, folder):
        data["categories"] = [{"id": number, "name": f"class {number}"} for number in known]
        data["annotations"] = [
            {"id": 20 + number, "image_id": (9, 5)[number % 2], "category_id": used[number % len(used)]}
            | {"bbox": [20, 20, 5, 5]}
            for number in range(12)
        ]

    return spoil


def link_outside(data, folder):
    Image.new("RGB", (64, 48)).save(folder.parent / "outside.png")
    (folder / "inside.png").symlink_to(folder.parent / "outside.png")
    data["images"][0]["file_name"] = "inside.png"


def link_of_a_folder(data, folder):
    (folder.parent / "elsewhere").mkdir()
    Image.new("RGB", (64, 48)).save(folder.parent / "elsewhere" / "a.png")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    data["images"][0]["file_name"] = "linked/a.png"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-20])


def code(counts):
    """A run-length code of image 9."""
    return {"size": [48, 64], "counts": counts}


def centred():
    """Twelve boxes of image 9 as (centre x, centre y, width, height); five of them extend beyond it as (x, y, w, h)."""
    return [
        {"id": 20 + number, "image_id": 9, "category_id": 4, "bbox": [50 - 2 * number, 20 + number % 3, 24, 16]}
        for number in range(12)
    ]


SIZED = {"file_name": "5.png", "width": 50, "height": 40}
NAN, INF = float("nan"), float("inf")
A11, I9 = "annotation 11", "image 9"
# case: (what spoils the clean json, what is found)
COCO = {
    "no images": (lambda data, folder: data.update(images=[], annotations=[]), [("file-empty", "file")]),
    "no categories": (lambda data, folder: data.update(categories=[], annotations=[]), [("file-empty", "file")]),
    "category no object": (append("categories", "apple"), [("category-record", "categories[3]")]),
    "category id a list": (append("categories", {"id": ["1"], "name": "a"}), [("category-id", "categories[3]")]),
    "category id text": (append("categories", {"id": "one", "name": "a"}), [("category-type", "category 8")]),
    "image id huge": (append("images", {"id": 2**63, **SIZED}), [("image-type", "image 10")]),
    "category id digits": (append("categories", {"id": "1", "name": "a"}), [("category-type", "category 1")]),
    "category name a number": (category(name=2146), [("category-type", "category 4")]),
    "category name invisible": (category(name=" \u200b"), [("category-name", "category 4")]),
    "category name a dot": (category(name=" ."), [("category-name", "category 4")]),
    "category name twice": (category(name="quince"), [("category-name-twice", "category 7")]),
    "category name twice as a word": (category(name="Apple_"), [("category-name-twice", "category 2")]),
    "category copied": (again("categories"), [("category-copy", "category 4")]),
    "category id taken": (again("categories", name="fig"), [("category-conflict", "category 4")]),
    "category without name": (without("categories", "name"), [("category-name", "category 4")]),
    "image no object": (append("images", [1]), [("image-record", "images[2]")]),
    "image id a list": (append("images", {"id": [1], **SIZED}), [("image-id", "images[2]")]),
    "image copied": (again("images"), [("image-copy", I9)]),
    "image id taken": (again("images", license=3), [("image-conflict", I9)]),
    "image id digits": (image(id="9"), [("image-type", I9)]),
    "image size digits": (image(width="64", height="48"), [("image-type", I9)] * 2),
    "too many pixels": (image(width=2**16, height=2**16), [("image-size", I9)]),
    "no width": (without("images", "width"), [("image-size", I9)]),
    "height zero": (image(height=0), [("image-size", I9)]),
    "height fraction": (image(height=48.5), [("image-size", I9)]),
    "width huge": (image(width=10**400), [("image-size", I9)]),
    "width true": (image(width=True), [("image-size", I9)]),
    "no file name": (without("images", "file_name"), [("image-name", I9)]),
    "file name a number": (image(file_name=3), [("image-name", I9)]),
    "file name absolute": (image(file_name="/etc/passwd"), [("image-escape", I9)]),
    "file name above": (image(file_name="sub/../../x.jpg"), [("image-escape", I9)]),
    "file linked": (link_outside, [("image-escape", I9)]),
    "folder linked": (link_of_a_folder, [("image-escape", I9)]),
    "no file": (file(Path.unlink), [("image-missing", I9)]),
    "name of a folder": (image(file_name="sub"), [("image-missing", I9)]),
    "name no file can have": (image(file_name="a\0b" + "\ud800"), [("image-missing", I9)]),
    "name too long": (image(file_name="a" * 5000), [("image-missing", I9)]),
    "name with backslashes": (image(file_name=TURNED.replace("/", "\\")), [("image-backslash", I9)]),
    "no file, and backslashes": (image(file_name="a\\b.png"), [("image-missing", I9)]),
    "no picture": (file(lambda path: path.write_text("<html>")), [("image-unreadable", I9)]),
    "too small": (file(lambda path: Image.new("L", (64, 9)).save(path)), [("image-unreadable", I9)]),
    "truncated": (file(truncate), [("image-unreadable", I9)]),
    "not rotated": (file(lambda path: Image.new("L", (48, 64)).save(path)), [("image-mismatch", I9)]),
    "annotation no object": (append("annotations", None), [("annotation-record", "annotations[3]")]),
    "no annotation id": (without("annotations", "id"), [("annotation-id", "annotations[0]")]),
    "annotation id true": (annotation(id=True), [("annotation-id", "annotations[0]")]),
    "annotation id huge": (annotation(id=2**63), [("annotation-id", "annotations[0]")]),
    "annotation copied": (again("annotations"), [("annotation-copy", A11)]),
    "annotation id taken": (again("annotations", bbox=[1, 1, 5, 5]), [("annotation-conflict", A11)]),
    "no image id": (without("annotations", "image_id"), [("annotation-field", A11)]),
    "image id of a list": (annotation(image_id=[9]), [("annotation-field", A11)]),
    "category id text in use": (annotation(category_id="four"), [("annotation-field", A11)]),
    "category id digits in use": (annotation(category_id="4"), [("annotation-type", A11)]),
    "image id a float": (annotation(image_id=9.0), [("annotation-type", A11)]),
    "image id a fraction": (annotation(image_id=9.5), [("annotation-field", A11)]),
    "no box": (without("annotations", "bbox"), [("annotation-field", A11)]),
    "box of three": (annotation(bbox=[1, 2, 3]), [("annotation-field", A11)]),
    "box of text": (annotation(bbox=["one", 2, 3, 4]), [("annotation-field", A11)]),
    "box of digits": (annotation(bbox=["1", "2.5", 3, "4e0"]), [("annotation-type", A11)]),
    "box of booleans": (annotation(bbox=[True, 1, 5, 5]), [("annotation-field", A11)]),
    "crowd maybe": (annotation(iscrowd="maybe"), [("annotation-flag", A11)]),
    "ignore of two": (annotation(ignore=2), [("annotation-flag", A11)]),
    "crowd null": (annotation(iscrowd=None), [("annotation-type", A11)]),
    "crowd digit": (annotation(iscrowd="0"), [("annotation-type", A11)]),
    "image unknown": (annotation(image_id=99), [("image-unknown", A11)]),
    "category unknown": (annotation(category_id=77), [("category-unknown", A11)]),
    "box with nan": (annotation(bbox=[NAN, 1, 5, 5]), [("box-not-finite", A11)]),
    "box infinite": (annotation(bbox=[1, 1, INF, 5]), [("box-not-finite", A11)]),
    "box huge": (annotation(bbox=[1, 1, 10**400, 5]), [("box-not-finite", A11)]),
    "box of zero width": (annotation(bbox=[1, 1, 0, 5]), [("box-empty", A11)]),
    "box of negative height": (annotation(bbox=[9, 9, 5, -4]), [("box-empty", A11)]),
    "box right of the image": (annotation(bbox=[64, 9, 5, 4]), [("box-outside", A11)]),
    "box below the image": (annotation(bbox=[6, 48, 5, 9]), [("box-outside", A11)]),
    "box above the image": (annotation(bbox=[6, -9, 5, 9]), [("box-outside", A11)]),
    "box far away": (annotation(bbox=[1e308, 9, 1e308, 4]), [("box-outside", A11)]),
    "box leaves right": (annotation(bbox=[60, 9, 5.1, 4]), [("box-partly-outside", A11)]),
    "box leaves below": (annotation(bbox=[6, 9, 5, 41]), [("box-partly-outside", A11)]),
    "box leaves above": (annotation(bbox=[6, -1.1, 5, 9]), [("box-partly-outside", A11)]),
    "polygon of odd length": (annotation(segmentation=[[1, 1, 2, 2, 3, 9], [1] * 7]), [("polygon", A11)]),
    "polygon with nan": (annotation(segmentation=[[1, 1, 2, 2, 3, NAN], [1, 1, 2, 2, 3, 9]]), [("polygon", A11)]),
    "polygon of two points": (annotation(segmentation=[[1, 1, 2, 2, 3, 9], [1, 1, 2, 2]]), [("polygon", A11)]),
    "polygon of text": (annotation(segmentation=[[1, 1, 2, 2, 3, 9], [1, 1, 2, 2, 3, "x"]]), [("polygon", A11)]),
    "polygon of digits": (annotation(segmentation=[[1, 1, 2, 2, 3, "9"]]), [("annotation-type", A11)]),
    "polygon far away": (annotation(segmentation=[[1, 1, 2, 2, 3, 1e9], [1, 1, 2, 2, 3, 9]]), [("polygon", A11)]),
    "no whole polygon": (annotation(segmentation=[1, 1, 2, 2, 3, None]), [("segmentation", A11)]),
    "flat polygon": (annotation(segmentation=[1, 1, 2, 2, 3, 9]), [("annotation-type", A11)]),
    "flat polygon of four": (annotation(segmentation=[1, 1, 5, 9]), [("segmentation", A11)]),
    "polygon of four": (annotation(segmentation=[[1, 1, 5, 9]]), [("segmentation", A11)]),
    "segmentation of text": (annotation(segmentation="x"), [("segmentation", A11)]),
    "rle of another size": (annotation(segmentation={"size": [64, 48], "counts": "x"}), [("segmentation", A11)]),
    "rle of another length": (annotation(segmentation=code([3000, 1])), [("segmentation", A11)]),
    "rle of a negative length": (annotation(segmentation=code([3073, -1])), [("segmentation", A11)]),
    "rle of digits": (annotation(segmentation=code(["3000", 72.0])), [("annotation-type", A11)]),
    "rle of fractions": (annotation(segmentation=code([3071.5, 0.5])), [("segmentation", A11)]),
    "rle text of another length": (annotation(segmentation=code("PPYo1")), [("segmentation", A11)]),
    "rle text that ends early": (annotation(segmentation=code("PPYo")), [("segmentation", A11)]),
    "rle text of no code": (annotation(segmentation=code("\u00e4")), [("segmentation", A11)]),
    "rle without counts": (annotation(segmentation={"size": [48, 64]}), [("segmentation", A11)]),
    "area zero": (annotation(area=0), [("area", A11)]),
    "area nan": (annotation(area=NAN), [("area", A11)]),
    "area text": (annotation(area="large"), [("area", A11)]),
    "area digits": (annotation(area="150"), [("annotation-type", A11)]),
    "area above the image's": (annotation(area=64 * 48 + 1), [("area", A11)]),
    "corners": (
        boxes_as(lambda *corners: corners),
        [("suspected-xyxy", "file"), *(("box-partly-outside", f"annotation {number}") for number in range(20, 32))],
    ),
    "shares": (boxes_as(lambda x1, y1, x2, y2: (x1 / 64, y1 / 48, x2 / 64 - x1 / 64, 0.3)), [("suspected-shares", "file")]),
    "centres": (
        lambda data, folder: data.update(annotations=centred()),
        [("suspected-centres", "file"), *(("box-partly-outside", f"annotation {number}") for number in range(20, 25))],
    ),
    "ids one too low": (
        category_ids(known=(1, 2, 3), used=(0, 1, 2)),
        [("suspected-shift", "file"), *(("category-unknown", f"annotation {number}") for number in (20, 23, 26, 29))],
    ),
    "ids one too high": (
        category_ids(known=(0, 1, 5), used=(1, 6)),
        [("suspected-shift", "file"), *(("category-unknown", f"annotation {number}") for number in range(21, 32, 2))],
    ),
    "ids renumbered from 0": (
        category_ids(known=(1, 2, 7), used=(0, 1, 2)),
        [("suspected-shift", "file"), *(("category-unknown", f"annotation {number}") for number in (20, 23, 26, 29))],
    ),
    "ids renumbered from 1": (
        category_ids(known=(1, 2, 7), used=(1, 3)),
        [("suspected-shift", "file"), *(("category-unknown", f"annotation {number}") for number in range(21, 32, 2))],
    ),
}  # fmt: skip
LVIS = {
    "no frequency": (without("categories", "frequency"), [("category-frequency", "category 4")]),
    "frequency x": (category(frequency="x"), [("category-frequency", "category 4")]),
    "no url, no name": (without("images", "coco_url"), [("image-name", I9)]),
    "url that leads away": (image(coco_url="https://example.org/../x.jpg"), [("image-escape", I9)]),
    "name that leads away": (image(file_name="../x.jpg"), [("image-escape", I9)]),
    "no negatives": (without("images", "neg_category_ids"), [("federated-missing", I9)]),
    "not exhaustive no list": (image(not_exhaustive_category_ids=7), [("federated-missing", I9)]),
    "unknown negative": (image(neg_category_ids=[2, 77, "a", [1]]), [("federated-unknown", I9)]),
    "unknown not exhaustive": (image(not_exhaustive_category_ids=[77]), [("federated-unknown", I9)]),
    "in both lists": (image(neg_category_ids=[2, 7]), [("federated-both", I9)]),
    "placeholder url, no name": (image(coco_url="N/A"), [("image-name", I9)]),
    "negative of digits": (image(neg_category_ids=["2"]), [("image-type", I9)]),
    "annotated negative": (image(neg_category_ids=[2, 4]), [("federated-negative", I9)]),
}  # fmt: skip
CASES = {("coco", case): (fruit_json, *spoiled) for case, spoiled in COCO.items()}
CASES |= {("lvis", case): (lvis_json, *spoiled) for case, spoiled in LVIS.items()}
MASKS = {  # with --masks
    "no mask": (without("annotations", "segmentation"), [("mask-missing", A11)]),
    "no polygon": (annotation(segmentation=[]), [("mask-missing", A11)]),
}
CASES |= {("masks", case): (masks_json, *spoiled) for case, spoiled in MASKS.items()}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_problem_is_found_by_id_and_mended_or_left_with_a_statement(case, images):
    make, spoil, expected = CASES[case]
    data = make()
    spoil(data, images)
    before = copy.deepcopy(data)
    masks = make is masks_json
    found = problems(check(data, "fruit.json", images, decode=True, masks=masks))
    assert places(found) == expected
    if not data["images"]:
        with pytest.raises(DataError, match="no image left"):
            repair(data, found)
        return
    repaired, changes = repair(data, found, images)
    assert repr(data) == repr(before)
    left = problems(check(repaired, "repaired.json", images, decode=True, masks=masks))
    suspected = any(kind.startswith("suspected") for kind, _ in expected)
    assert places(left) == (expected if suspected else [place for place in expected if not KINDS[place[0]].fix])
    assert bool(changes) == (left != found)


def test_the_table_knows_every_kind():
    assert {kind for *_, expected in CASES.values() for kind, _ in expected} == KINDS.keys() - NOTES


@pytest.mark.parametrize("make, key", [(fruit_json, "file_name"), (lvis_json, "file_name"), (lvis_json, "coco_url")])
@pytest.mark.parametrize("name", ["/etc/passwd", "..", "../x.jpg", "/../x.jpg", "//x.jpg"])
def test_a_name_that_leaves_the_folder_is_found_without_looking_at_images(make, key, name):
    data = make()
    data["images"][0][key] = name
    leaves = (key, name) != ("coco_url", "/etc/passwd")  # of an address only "etc/passwd" is taken
    assert places(check_json(data, "fruit.json")) == [("image-escape", I9)] * leaves


def test_a_header_does_not_show_truncation_but_decoding_does(images):
    truncate(images / TURNED)
    assert check(fruit_json(), "fruit.json", images) == []
    assert places(check(fruit_json(), "fruit.json", images, decode=True)) == [("image-unreadable", I9)]


def test_images_without_annotations_are_notes(images, tmp_path, capsys):
    data = fruit_json()
    data["annotations"].pop(0)
    assert places(check(data, "fruit.json", images)) == [("image-without-annotations", I9)]
    assert main(["--json", str(write(tmp_path, data))]) == 0
    assert "note: image-without-annotations, 1" in capsys.readouterr().out


def test_the_suspicion_about_corners_states_its_counts():
    data = fruit_json()
    boxes_as(lambda *corners: corners)(data, None)
    assert (
        "of 13 boxes 13 lie in their image as (x1, y1, x2, y2), 12 extend beyond it" in check_json(data, "x")[0].detail
    )
    boxes_as(lambda x1, y1, x2, y2: (x1, y1, x2 - x1, y2 - y1))(data, None)
    assert check_json(data, "x") == []
    boxes_as(lambda *corners: corners)(data, None)
    del data["annotations"][9:]  # too few to tell a habit from accidents
    assert {kind for kind, _ in places(problems(check_json(data, "x")))} == {"box-partly-outside"}


def test_the_suspicion_about_category_ids_states_its_counts():
    data = fruit_json()
    category_ids(known=(1, 2, 3), used=(0, 1, 2))(data, None)
    seen = check_json(data, "x")[0].detail
    assert seen == "4 of 12 annotations have an unknown id; of the 3 ids in use each plus 1 is known"
    category_ids(known=(1, 2, 3), used=(1, 2, 3, 77))(data, None)
    assert {kind for kind, _ in places(problems(check_json(data, "x")))} == {"category-unknown"}


@pytest.mark.parametrize("data", [[], "x", None, {}, {"images": [], "annotations": None, "categories": []}])
def test_another_json_is_refused(data, tmp_path):
    path = write(tmp_path, data)
    with pytest.raises(DataError, match=r"fruit\.json has no list"):
        main(["--json", str(path)])


@pytest.mark.parametrize("text", ["{", "\xff", "[" * 100_000, "9" * 5000])
def test_what_python_cannot_parse_is_refused(text, tmp_path):
    path = tmp_path / "odd.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"odd\.json"):
        main(["--json", str(path)])


@pytest.mark.parametrize("depth", range(700, 1000, 20))
def test_deep_nesting_is_copied_or_refused(depth, tmp_path):
    """Two equal images, which are compared. Where Python's limit strikes depends on the depth of the caller."""
    image = f'{{"id": 5, "file_name": "5.png", "width": 50, "height": 40, "odd": {"[" * depth + "]" * depth}}}'
    path = tmp_path / "deep.json"
    path.write_text(f'{{"images": [{image}, {image}], "annotations": [], "categories": [{{"id": 1, "name": "a"}}]}}')
    with contextlib.suppress(DataError):
        assert main(["--json", str(path), "--fix", str(tmp_path / "out.json")]) == 0
        assert len(read_json(tmp_path / "out.json")["images"]) == 1


def test_a_missing_image_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        check(fruit_json(), "fruit.json", tmp_path / "nowhere")


# --- the images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_the_size_of_a_header_is_that_of_the_decoded_image(ending, orientation, tmp_path):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"image.{ending}"
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    assert image_size(path) == read_image(path).shape[1::-1]


OPENED = None


def _listen(event, arguments):
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


@pytest.fixture
def opened(monkeypatch):
    """The paths opened during the test. (An audit hook sees every way of opening, and stays: it is added once.)"""
    if not getattr(sys, "_ovdet2_listening", False):
        sys.addaudithook(_listen)
        sys._ovdet2_listening = True
    monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
    yield OPENED


@pytest.mark.parametrize("decode", [False, True])
def test_no_file_outside_of_the_image_root_is_opened(decode, images, opened, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 48)).save(secret)
    (images / "link.png").symlink_to(secret)
    (images / "up").symlink_to(tmp_path)
    (tmp_path / "images-too").mkdir()  # its path begins as the root's does
    (images / "neighbour.png").symlink_to(tmp_path / "images-too" / "a.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "images-too" / "a.png")
    names = [str(secret), "../secret.png", "link.png", "up/secret.png", "up/images/../secret.png", "neighbour.png"]
    data = fruit_json()
    data["annotations"] = []
    data["images"] += [
        {"id": 20 + number, "file_name": name, "width": 64, "height": 48} for number, name in enumerate(names)
    ]
    opened.clear()
    found = problems(check(data, "fruit.json", images, decode))
    assert places(found) == [("image-escape", f"image {20 + number}") for number in range(len(names))]
    touched = {os.path.realpath(path) for path in opened if str(tmp_path) in os.path.realpath(path)}
    assert touched == {str(images / TURNED), str(images / "5.png")}


def test_the_image_root_may_be_a_link(images, tmp_path):
    (tmp_path / "root").symlink_to(images)
    assert check(fruit_json(), "fruit.json", tmp_path / "root") == []


def test_any_number_of_workers_gives_the_same_report(images, tmp_path):
    data = fruit_json()
    for number in range(100, 180):  # more than one portion of work for each process
        name = f"{number}.png"
        data["images"].append({"id": number, "file_name": name, "width": 50, "height": 40})
        if number % 3:
            Image.new("L", (50, 40 + number % 2)).save(images / name)
    path, reports = write(tmp_path, data), []
    for workers in ("1", "2"):
        report = tmp_path / f"report{workers}.json"
        assert main(["--json", str(path), "--images", str(images), "--workers", workers, "--report", str(report)]) == 3
        reports.append(report.read_bytes())
    assert reports[0] == reports[1]
    assert {"image-missing", "image-mismatch"} <= {finding["kind"] for finding in json.loads(reports[0])["findings"]}


# --- the program ---------------------------------------------------------------------------------------------------


def test_what_is_printed_and_reported(tmp_path, capsys):
    data = fruit_json()
    data["annotations"] = [{**data["annotations"][0], "id": 100 + number, "bbox": [0, 0, 0, 0]} for number in range(25)]
    data["annotations"][0]["area"] = "\x1b[31m\ud800"  # would colour the terminal, and cannot be encoded
    path, report = write(tmp_path, data), tmp_path / "report.json"
    assert main(["--json", str(path), "--report", str(report)]) == 3
    printed = capsys.readouterr().out
    assert "box-empty, 25: box whose width or height is not positive" in printed
    assert "annotation 119: [0, 0, 0, 0] in an image of 64x48" in printed and "annotation 120:" not in printed
    assert "and 5 more" in printed and "problems: 26 (box-empty 25, area 1), notes: 1" in printed
    assert r"area '\x1b[31m\ud800'" in printed
    findings = json.loads(report.read_text())["findings"]
    assert [finding["id"] for finding in findings if finding["kind"] == "box-empty"] == list(range(100, 125))
    note = {"kind": "image-without-annotations", "id": 5, "index": 1, "detail": "", "of": "image", "note": True}
    assert findings[-1] == note
    main(["--json", str(path), "--max-shown", "2"])
    assert "and 23 more" in capsys.readouterr().out


def test_exit_codes(tmp_path, monkeypatch, capsys):
    data = fruit_json()
    data["annotations"][0]["bbox"] = [0, 0, 0, 0]
    bad, clean = write(tmp_path, data, "bad.json"), write(tmp_path, fruit_json())
    for arguments, code in (
        (["--json", clean], 0),
        (["--json", bad], 3),
        (["--json", tmp_path / "absent.json"], 3),
        (["--json", tmp_path], 3),
        (["--json", clean, "--workers", "0"], 2),
        (["--json", clean, "--max-shown", "-1"], 2),
        (["--json", clean, "--decode"], 2),
        ([], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["check_dataset.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        assert ended.value.code == code, arguments
    assert "Traceback" not in capsys.readouterr().err


# --- the cleaned copy ----------------------------------------------------------------------------------------------


def spoil_all(data):
    """Faults of many kinds, all of which can be mended; the text of the second name is not valid Unicode."""
    data["annotations"] += [
        {"id": 20, "image_id": 9, "category_id": 4, "bbox": [0, 0, 0, 5]},
        {"id": 21, "image_id": 9, "category_id": 4, "bbox": [50, -4, 20, 20], "area": -1},
        {"id": 21, "image_id": 9, "category_id": 2, "bbox": [1, 2, 3, 4]},
        {"id": 22, "image_id": 6, "category_id": 2, "bbox": [1, 2, 3, 4]},
    ]
    data["images"].append({"id": 6, "file_name": "absent.png", "width": 50, "height": 40})
    data["categories"][1]["name"] = "apple \ud800"


def test_fix_writes_a_copy_that_passes_and_tells_every_change(images, tmp_path, capsys):
    data = fruit_json()
    spoil_all(data)
    path, out, report = write(tmp_path, data), tmp_path / "clean" / "fruit.json", tmp_path / "report.json"
    before = path.read_bytes()
    arguments = ["--json", str(path), "--images", str(images)]
    assert main([*arguments, "--fix", str(out), "--report", str(report)]) == 0
    printed = capsys.readouterr().out
    assert path.read_bytes() == before
    assert main(["--json", str(out), "--images", str(images), "--decode"]) == 0
    told = json.loads(report.read_text())["fix"]
    assert told["left"] == []
    assert [(change["kind"], change["where"], change["done"]) for change in told["changes"]] == [
        ("image-missing", "image 6", "removed"),
        ("box-empty", "annotation 20", "removed"),
        ("box-partly-outside", "annotation 21", "bbox [50, -4, 20, 20] -> [50, 0, 14, 16]"),
        ("area", "annotation 21", "area -1 -> 224"),
        ("annotation-conflict", "annotation 21", "id 21 -> 23"),
        ("image-missing", "annotation 22", "removed"),
    ]
    assert "annotation 21: bbox [50, -4, 20, 20] -> [50, 0, 14, 16]" in printed
    clean = read_json(out)
    assert clean["manifest"]["source_sha256"] == sha256_file(path)
    assert [annotation["id"] for annotation in clean["annotations"]] == [11, 12, 10, 21, 23]
    assert clean["categories"] == data["categories"] and clean["annotations"][:3] == fruit_json()["annotations"]
    assert not list(out.parent.glob(".*tmp"))


def test_fix_takes_contradicting_ids_out_of_the_lists_of_lvis():
    data = lvis_json()
    data["images"][0] |= {"neg_category_ids": [4, 2, 77, 7], "not_exhaustive_category_ids": [7, "x"]}
    repaired, changes = repair(data, check_json(data, "x"))
    assert repaired["images"][0] == data["images"][0] | {"neg_category_ids": [2], "not_exhaustive_category_ids": [7]}
    assert [change.kind for change in changes] == ["federated-unknown", "federated-both", "federated-negative"]
    # The annotation goes, and with it the contradiction: class 4 may rightly be absent from the image.
    data = lvis_json()
    data["images"][0]["neg_category_ids"] = [4]
    data["annotations"][0]["bbox"] = [0, 0, 0, 0]
    repaired, changes = repair(data, check_json(data, "x"))
    assert repaired["images"] == data["images"]
    assert [change.kind for change in changes] == ["box-empty"]


def test_fix_leaves_what_it_would_have_to_guess_and_says_so(tmp_path, capsys):
    data = fruit_json()
    boxes_as(lambda *corners: corners)(data, None)
    data["annotations"].append({"id": 90, "image_id": 5, "category_id": 4, "bbox": [0, 0, 0, 5]})
    path, out = write(tmp_path, data), tmp_path / "out.json"
    assert main(["--json", str(path), "--fix", str(out)]) == 3
    assert read_json(out)["annotations"] == data["annotations"][:-1]
    printed = capsys.readouterr().out
    assert "written, changes: 1" in printed
    assert "would be a guess: problems: 13 (suspected-xyxy 1, box-partly-outside 12)" in printed


def test_fix_refuses_to_write_a_file_without_images_and_still_reports(images, tmp_path):
    path, out, report = write(tmp_path, fruit_json()), tmp_path / "out.json", tmp_path / "report.json"
    outputs = ["--fix", str(out), "--report", str(report)]
    with pytest.raises(DataError, match="no image left: check the image folder"):
        main(["--json", str(path), "--images", str(images / "sub"), *outputs])
    assert not out.exists()
    assert [finding["kind"] for finding in json.loads(report.read_text())["findings"]] == ["image-missing"] * 2


def test_fix_never_replaces_the_input_or_by_accident_another_file(tmp_path):
    data = fruit_json()
    path, other, link, hard = write(tmp_path, data), tmp_path / "other.json", tmp_path / "a.json", tmp_path / "b.json"
    link.symlink_to(path)
    os.link(path, hard)
    (tmp_path / "folder").mkdir()
    before = path.read_bytes()
    for option in ("--fix", "--report"):
        for output in (path, link, hard, tmp_path / "folder" / ".." / path.name):
            with pytest.raises(UsageError, match="never changed"):
                main(["--json", str(path), option, str(output), "--overwrite"])
    with pytest.raises(UsageError, match="two files"):
        main(["--json", str(path), "--fix", str(other), "--report", str(other)])
    with pytest.raises(UsageError, match="folder is a folder"):
        main(["--json", str(path), "--fix", str(tmp_path / "folder"), "--overwrite"])
    other.write_text("mine")
    with pytest.raises(UsageError, match=r"other\.json exists"):
        main(["--json", str(path), "--fix", str(other)])
    assert other.read_text() == "mine"
    assert main(["--json", str(path), "--fix", str(other), "--overwrite"]) == 0
    assert (
        {**read_json(other), "manifest": None} == {**data, "manifest": None}
        and path.read_bytes() == before
        and link.is_symlink()
    )


sizes = st.tuples(st.integers(1, 2**40), st.integers(1, 2**40))
coordinates, lengths = st.floats(-1e300, 1e300), st.floats(0, 1e300, exclude_min=True)


@settings(max_examples=100, deadline=None)
@given(st.tuples(coordinates, coordinates, lengths, lengths), sizes)
def test_a_clipped_box_lies_in_its_image_and_keeps_an_area(box, size):
    if not all(start + length > 0 and start < side for start, length, side in zip(box, box[2:], size)):
        return
    clipped = clip_box(box, size)
    assert all(start >= 0 and length > 0 for start, length in zip(clipped, clipped[2:]))
    assert all(start + length <= side * (1 + 1e-15) for start, length, side in zip(clipped, clipped[2:], size))


# --- fuzzing -------------------------------------------------------------------------------------------------------

text = st.text(st.characters(), max_size=8)  # lone surrogates and zero characters included
numbers = st.integers(-3, 60) | st.floats() | st.sampled_from([True, -(10**400), 10**400, 2**63, 1e308])
junk = st.recursive(
    st.none() | numbers | text, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=2)
)
paths = text | st.sampled_from(
    ["5.png", TURNED, "/etc/passwd", "../x.png", "sub/../../x", "..", ".", "link", "a/b.jpg"]
)


def mostly(value):
    """``value`` four times in five, otherwise anything."""
    return st.integers(0, 4).flatmap(lambda draw: value if draw else junk)


def records(start=(), **fields):
    """Lists of the good records ``start`` and of others, with most of the fields, most of them right."""
    needed = {key: mostly(value) for key, value in fields.items() if key in ("id", "image_id", "category_id", "bbox")}
    others = {key: mostly(value) for key, value in fields.items() if key not in needed}
    other = mostly(st.fixed_dictionaries(needed, optional=others))
    return st.lists(other, max_size=6).map(lambda drawn: [*start, *drawn])


ids, classes = st.sampled_from([5, 9, 10, 11, 12]), st.sampled_from([2, 4, 7])
corner, side = st.integers(-2, 45), st.integers(-1, 45)
lists = st.lists(mostly(classes), max_size=3)
wild = st.fixed_dictionaries(
    {
        "images": records(
            [{"id": 5, **SIZED}],
            id=st.integers(9, 12),
            file_name=paths,
            coco_url=paths,
            width=st.just(50),
            height=st.just(40),
            neg_category_ids=lists,
            not_exhaustive_category_ids=lists,
        ),
        "annotations": records(
            id=st.integers(1, 9),
            image_id=ids,
            category_id=classes,
            bbox=st.tuples(*map(mostly, (corner, corner, side, side))).map(list),
            area=numbers,
            iscrowd=st.sampled_from([0, 1]),
            segmentation=st.lists(st.lists(mostly(corner), min_size=5, max_size=8), max_size=3)
            | st.fixed_dictionaries({"size": st.just([40, 50]), "counts": junk}),
        ),
        "categories": records(fruit_json()["categories"], id=st.just(9), name=text, frequency=st.just("r")),
    }
)


def assert_only_valid_records(data, folder):
    """The loader refuses a json, or gives boxes to train on and paths below the root."""
    path = write(folder, data, "fuzz.json")
    try:
        records = load_ov_json(path, "root", FRUIT)
    except DataError:
        return
    for loaded in records:
        assert os.path.normpath(loaded["file_name"]).startswith("root")
        width, height = loaded["width"], loaded["height"]
        assert 0 < width < INF and 0 < height < INF
        for annotation in loaded["annotations"]:
            x, y, w, h = annotation["bbox"]
            assert 0 < w < INF and 0 < h < INF and -INF < x < width and -INF < y < height
            assert annotation["category_id"] in range(3) and annotation["iscrowd"] in (0, 1)


@pytest.fixture(scope="module")
def fuzz_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    write_images(folder / "images")
    (folder / "images" / "link").symlink_to("/etc/passwd")
    return folder


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=wild | junk)
@example(
    data=fruit_json()
    | {
        "annotations": [],
        "images": [{"id": 9, "neg_category_ids": []}, {"id": 5, "width": 50, "height": 40, "coco_url": "5.png"}],
    }
)
def test_any_json_is_checked_and_mended_without_a_traceback(data, fuzz_folder):
    """What is left after mending is what mending would have to guess. Two images of one id are such: which of them a
    box belongs to is unknown, so nothing is promised of such a file's boxes. The example is LVIS only by a
    record that has to go, and names its other image as LVIS does."""
    assert_only_valid_records(data, fuzz_folder)
    try:
        found = check(data, "fuzz.json", fuzz_folder / "images")
        json.dumps(found, ensure_ascii=False).encode()
        repaired, _ = repair(data, found, fuzz_folder / "images")
    except DataError:
        return
    left = problems(check(json.loads(json.dumps(repaired)), "fixed.json", fuzz_folder / "images"))
    assert all(not KINDS[finding.kind].fix for finding in left) or "image-conflict" in {f.kind for f in found}
    assert_only_valid_records(repaired, fuzz_folder)


not_ids = st.none() | text | st.floats() | st.booleans() | st.lists(ids, max_size=2) | st.integers(min_value=2**63)
not_ids = not_ids.filter(lambda value: as_integer(value) is value)
not_boxes = junk.filter(lambda value: not (isinstance(value, list) and len(value) == 4))
digits = st.sampled_from([str, float, lambda number: f" {number}"]).flatmap(
    lambda form: st.sampled_from([("category_id", form(4)), ("image_id", form(9))])
)
FAULTS = {
    "annotation-field": st.tuples(st.sampled_from(["image_id", "category_id"]), not_ids)
    | st.tuples(st.just("bbox"), not_boxes),
    "image-unknown": st.tuples(st.just("image_id"), st.integers(10, 2**63 - 1)),
    "category-unknown": st.tuples(st.just("category_id"), st.integers(8, 2**63 - 1)),
    "box-not-finite": st.tuples(
        st.just("bbox"),
        st.permutations([1, 2.5, 3]).flatmap(
            lambda box: st.sampled_from([NAN, INF, -INF, 10**400]).map(lambda value: [*box, value])
        ),
    ),
    "box-empty": st.tuples(st.just("bbox"), st.floats(-1e9, 0).map(lambda side: [3, 4, 5, side])),
    "box-outside": st.tuples(st.just("bbox"), st.floats(64, 1e300).map(lambda x: [x, 4, 5, 6])),
    "box-partly-outside": st.tuples(st.just("bbox"), st.floats(65, 1e300).map(lambda w: [1, 4, w, 6])),
    "area": st.tuples(st.just("area"), st.floats(max_value=0) | text | st.booleans()).filter(
        lambda fault: as_number(fault[1]) is fault[1]
    ),
    "segmentation": st.tuples(st.just("segmentation"), st.lists(numbers, min_size=1, max_size=5) | text | numbers),
    "annotation-type": digits
    | st.tuples(st.just("bbox"), st.permutations([1, 2, 3, "4"]).map(list))
    | st.tuples(st.sampled_from(["iscrowd", "ignore"]), st.sampled_from([None, "0", "1", "", 1.0, "true"]))
    | st.tuples(st.just("segmentation"), st.sampled_from([[1, 2, 3, 4, 5, 6], [["1", 2, 3, 4, 5, 6]]])),
    "annotation-flag": st.tuples(
        st.sampled_from(["iscrowd", "ignore"]), st.sampled_from([2, -1, "some", [1], 0.5, {}])
    ),
}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.none() | st.one_of(*(st.tuples(st.just(kind), how) for kind, how in FAULTS.items())), max_size=8))
@example([("annotation-field", ("bbox", [True, 1, 2, 3]))])
def test_an_injected_fault_is_reported_by_its_id_and_nothing_else_is(fuzz_folder, faults):
    data, expected = fruit_json(), set()
    for number, fault in enumerate(faults, start=100):
        data["annotations"].append({"id": number, "image_id": 9, "category_id": 4, "bbox": [1, 2, 3, 4]})
        if fault is not None:
            kind, (key, value) = fault
            data["annotations"][-1][key] = value
            expected.add((kind, f"annotation {number}"))
    found = problems(check(data, "fuzz.json", fuzz_folder / "images"))
    assert set(places(found)) == expected
    repaired, _ = repair(data, found)
    assert problems(check(repaired, "fixed.json", fuzz_folder / "images")) == []
    costs_the_box = {where for kind, where in expected if KINDS[kind].fix.startswith("removed")}
    assert len(repaired["annotations"]) == len(data["annotations"]) - len(costs_the_box)
    assert_only_valid_records(data, fuzz_folder)


@settings(max_examples=60, deadline=None)
@given(paths)
def test_only_names_of_images_below_the_root_are_opened(fuzz_folder, name):
    data = fruit_json()
    data["images"].append({"id": 6, "file_name": name, "width": 50, "height": 40})
    found = problems(check(data, "fuzz.json", fuzz_folder / "images"))
    leads_to = {"5.png": set(), TURNED: {"image-mismatch"}, "link": {"image-escape"}}
    if name in leads_to:
        assert {finding.kind for finding in found} == leads_to[name]
    else:
        assert [finding.id for finding in found] == [6]
    assert_only_valid_records(data, fuzz_folder)


# --- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="needs ../shared/data/coco_mini")
@pytest.mark.parametrize("part, notes", [("train2017", [508]), ("val2017", [58636, 226111])])
def test_coco_mini_is_clean_but_for_images_without_annotations(part, notes):
    path = COCO_MINI / "annotations" / f"instances_{part}.json"
    found = check(read_json(path), path, COCO_MINI / part, decode=part == "val2017")
    assert [(finding.kind, finding.id) for finding in found] == [("image-without-annotations", id) for id in notes]
