"""Preparing OV-COCO and OV-LVIS: layouts of other code bases, published counts, atomicity, no leak of novel classes.

The layouts are imitations: made here from the official annotations of a few COCO images (../shared/data/coco_mini), or
from a toy, as the scripts of those code bases make them. None of the files they distribute is read.
"""

import copy
import errno
import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.data.datasets import prepare
from ovdet2.data.datasets.coco_json import filter_coco_json, load_ov_json
from ovdet2.data.datasets.dialects import import_ov_coco, recognise, to_coco_ids
from ovdet2.data.datasets.lvis_split import check_lvis_test, filter_lvis_json, frequency_split, prepare_lvis_train
from ovdet2.data.datasets.prepare import Official, prepare_split
from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.errors import DataError, SetupError
from ovdet2.io import files

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"
COCO_MINI = SHARED / "coco_mini" / "annotations"
LVIS_FIXTURE = SHARED / "lvis_api_fixture" / "data" / "lvis_val_100.json"
needs_lvis_fixture = pytest.mark.skipif(not LVIS_FIXTURE.is_file(), reason="needs ../shared/data/lvis_api_fixture")

BASE, NOVEL = dict(OV_COCO.base), dict(OV_COCO.novel)
ALL = BASE | NOVEL
TRAIN, VAL = "ov_coco_train_base.json", "ov_coco_val_all.json"
HASHES = {
    TRAIN: "37e458a92a6db65432e84666959c0c79ab4c9bcd3e076c90d27bfcc688dc74f9",
    VAL: "b39b9c3fc7a7e75e4d650ae3e79715038d11887463b27bcc8cf3900e8e840a2f",
}
UNCHECKED = {TRAIN: Official(0, 0, {"images": 0}), VAL: Official(0, 0, {"images": 0})}


def load_script(name):
    """A new copy of a preparation program as a module, so that its published counts can be replaced."""
    spec = importlib.util.find_spec(f"ovdet2.programs.{name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def read(path):
    return json.loads(path.read_text())


def content(data):
    """What a detector sees of a json, without order and numbering: images and (image, class name, box, crowd)."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    images = {(image["id"], image.get("file_name"), image["height"], image["width"]) for image in data["images"]}
    annotations = Counter(
        (entry["image_id"], names[entry["category_id"]], tuple(entry["bbox"]), entry.get("iscrowd", 0))
        for entry in data["annotations"]
    )
    return images, annotations, {(category["id"], category["name"]) for category in data["categories"]}


# --- imitations of the layouts in circulation ------------------------------------------------------------------------


def annotated_only(data):
    used = {entry["image_id"] for entry in data["annotations"]}
    return {**data, "images": [image for image in data["images"] if image["id"] in used]}


def of_classes(data, classes):
    return {**data, "annotations": [entry for entry in data["annotations"] if entry["category_id"] in classes]}


def listing(data, classes, **fields):
    categories = [{**category, **fields} for category in data["categories"] if category["id"] in classes]
    return {**data, "categories": categories}


def regionclip(data, classes):
    return annotated_only(of_classes(listing(data, classes, split="any"), classes))


def ovr_cnn(data, classes):
    vectors = {"GloVE": [0.25] * 300, "BertEmb": [0.5] * 768}
    return annotated_only(of_classes(listing(data, classes, embedding=vectors, split="any"), classes))


def detic(data, classes):
    return {**ovr_cnn(data, classes), "categories": data["categories"]}


def clipself(data, classes):
    return {**regionclip(data, classes), "categories": listing(data, ALL)["categories"]}


def wusize(data, classes):
    return of_classes(data, classes)


def renumbered(data, new_id):
    categories = [{**category, "id": new_id[category["id"]]} for category in data["categories"]]
    annotations = [{**entry, "category_id": new_id[entry["category_id"]]} for entry in data["annotations"]]
    return {**data, "categories": categories, "annotations": annotations}


def vldet(data, classes):
    return renumbered(clipself(data, classes), {old: new for new, old in enumerate(sorted(ALL), start=1)})


def oadp(data, classes):
    kept = of_classes(listing(data, ALL), classes)
    kept = renumbered(kept, {old: new for new, old in enumerate(list(BASE) + list(NOVEL))})
    kept["categories"].sort(key=lambda category: category["id"])
    if classes == ALL:  # their ".min" file; the training file keeps every image
        kept = annotated_only(kept)
    return {key: kept[key] for key in ("categories", "annotations", "images")}


# what recognise() calls it: (imitation, classes of each of its test files; None where it has a file to train on only)
LAYOUTS = {
    "OVR-CNN": (ovr_cnn, [ALL]),
    "OVR-CNN, base and novel apart": (ovr_cnn, [BASE, NOVEL]),
    "RegionCLIP": (regionclip, [ALL]),
    "CLIPSelf (_65_cat)": (clipself, None),
    "Detic, CoDet (_oriorder)": (detic, [ALL]),
    "wusize (BARON, CLIM)": (wusize, [BASE, NOVEL]),
    "VLDet (_del)": (vldet, [ALL]),
    "OADP, HD-OVD": (oadp, [ALL]),
}


@pytest.fixture(scope="module")
def official():
    """{"train2017": json, "val2017": json} of coco_mini; not to be changed."""
    if not COCO_MINI.is_dir():
        pytest.skip("needs ../shared/data/coco_mini")
    return {subset: read(COCO_MINI / f"instances_{subset}.json") for subset in ("train2017", "val2017")}


@pytest.fixture(scope="module")
def expected(official, tmp_path_factory):
    """{name of a prepared file: its json} as made from the official files."""
    folder = tmp_path_factory.mktemp("official")
    for subset, data in official.items():
        write(folder / f"instances_{subset}.json", data)
    return {path.name: read(path) for path, _ in prepare_split(folder, "ov_coco", OV_COCO)}


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_gives_what_the_official_files_give_and_nothing_novel_to_train_on(
    case, official, expected, tmp_path
):
    imitate, tests = LAYOUTS[case]
    sources = [write(tmp_path / "a.json", imitate(official["train2017"], BASE))]
    for number, classes in enumerate(tests or []):
        sources.append(write(tmp_path / f"b{number}.json", imitate(official["val2017"], classes)))
    reports = {path: report for path, report in import_ov_coco(sources, tmp_path / "out", UNCHECKED)}
    assert {path.name for path in reports} == ({TRAIN, VAL} if tests else {TRAIN})
    for path, report in reports.items():
        assert content(read(path)) == content(expected[path.name])
        assert all(case.split(", base")[0] in line for line in report["layouts"])
        assert report["crowds"] == sum(entry["iscrowd"] for entry in expected[path.name]["annotations"]) > 0
    train = read(tmp_path / "out" / TRAIN)
    assert {entry["category_id"] for entry in train["annotations"]} <= set(BASE)
    assert all("embedding" not in category for category in train["categories"])
    assert load_ov_json(tmp_path / "out" / TRAIN, tmp_path, OV_COCO, base_only=True)


def test_novel_annotations_of_a_training_source_are_left_behind(official, expected, tmp_path):
    """The official file, files of all 65 classes, and files with pseudo boxes of novel classes have them."""
    for number, data in enumerate((official["train2017"], oadp(official["train2017"], ALL))):
        novel = [entry for entry in data["annotations"] if entry["category_id"] not in BASE]
        source = write(tmp_path / f"{number}.json", data)
        assert novel
        [(path, _)] = import_ov_coco([source], tmp_path / f"out{number}", UNCHECKED)
        assert content(read(path)) == content(expected[TRAIN])


def test_the_imported_manifest_names_source_layout_and_hash(official, tmp_path):
    source = write(tmp_path / "oadp.json", oadp(official["train2017"], BASE))
    [(path, report)] = import_ov_coco([source], tmp_path, UNCHECKED)
    named = {"file": "oadp.json", "sha256": files.sha256_file(source), "layout": "OADP, HD-OVD"}
    assert read(path)["manifest"]["sources"] == [named]
    assert report["layouts"] == [
        f"from {source}: OADP, HD-OVD layout (65 categories numbered 0 to 64, base classes first)"
    ]


def _drop_names(data):
    for category in data["categories"]:
        del category["name"]


def _rename(data):
    data["categories"][2]["name"] = "aeroplane"


def _twice(key):
    return lambda data: data["categories"][1].update({key: data["categories"][0][key]})


def _alphabetical(data):
    order = sorted(data["categories"], key=lambda category: category["name"])
    new = {category["id"]: number for number, category in enumerate(order)}
    data.update(renumbered(data, new))


def _swapped(data):
    """Ids of VLDet, but for two classes that changed places: one slip away from silent nonsense."""
    first, second = data["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def _other_list(data):
    """Detic's tool, which replaces the list of categories, run on a file that VLDet renumbered."""
    data["categories"] = [{"id": i, "name": name} for i, name in (*OV_COCO.base, *OV_COCO.novel, *OV_COCO_UNUSED)]


REFUSED = {
    "contiguous ids without names": (
        oadp,
        _drop_names,
        "without a name.*VLDet numbers 65 classes from 1.*OADP from 0.*official",
    ),
    "unknown name": (regionclip, _rename, "COCO does not have: 'aeroplane'.*official COCO files instead"),
    "id twice": (regionclip, _twice("id"), "category id 1 twice"),
    "name twice": (regionclip, _twice("name"), "category name 'person' twice"),
    "another order": (oadp, _alphabetical, r"neither as COCO.*0 for airplane \(COCO: 5\).*order is ambiguous"),
    "two classes swapped": (vldet, _swapped, r"1 for bicycle \(COCO: 2\)"),
    "list replaced": (
        vldet,
        _other_list,
        r"categories that it does not list: \d+ \(annotation \d+\).*numbered differently",
    ),
    "a class missing": (
        regionclip,
        lambda data: data["categories"].pop(),
        "annotations of categories that it does not",
    ),
    "a set of no layout": (clipself, lambda data: data["categories"].pop(4), "64 categories, not the 48 base"),
    "no categories": (regionclip, lambda data: data.update(categories=[], annotations=[]), "has no category"),
    "not instances": (regionclip, lambda data: data.pop("annotations"), "no list 'annotations'"),
    "our own": (regionclip, lambda data: data.update(manifest={}), "needs no conversion"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_for_certain_is_refused(case, official, tmp_path):
    imitate, spoil, message = REFUSED[case]
    data = copy.deepcopy(imitate(official["train2017"], BASE))
    spoil(data)
    source = write(tmp_path / "other.json", data)
    with pytest.raises(DataError, match=f"(?s){message}") as caught:
        list(import_ov_coco([source], tmp_path / "out", UNCHECKED))
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_classes_repeated_annotations_and_unknown_subsets_are_refused(official, tmp_path):
    def refuse(message, *jsons, names=("x.json", "y.json")):
        sources = [write(tmp_path / name, data) for name, data in zip(names, jsons)]
        with pytest.raises(DataError, match=message):
            list(import_ov_coco(sources, tmp_path / "out", UNCHECKED))

    train, val = official["train2017"], official["val2017"]
    refuse("no annotation of a base class, which ov_coco_train_base.json needs", ovr_cnn(train, NOVEL))
    refuse("no annotation of a novel class.*--from BASE_FILE NOVEL_FILE", wusize(val, BASE))
    refuse("no annotation of a base class", wusize(val, NOVEL))
    refuse(r"328 annotations occur twice, id \d+", detic(val, ALL), oadp(val, ALL))
    refuse("images of train2017 and of val2017", {**train, "images": train["images"] + val["images"]})
    bare = regionclip(train, BASE)
    bare["images"] = [{key: image[key] for key in image if key != "coco_url"} for image in bare["images"]]
    refuse("neither the coco_url of its images nor its file name", bare)
    source = write(tmp_path / "ovd_ins_train2017_b.json", bare)
    assert [path.name for path, _ in import_ov_coco([source], tmp_path / "out", UNCHECKED)] == [TRAIN]


# --- any order of the lists ------------------------------------------------------------------------------------------


def toy_coco():
    """Every COCO class once on one of 20 images, some of which show no class of OV-COCO; one crowd, one empty box."""
    classes = sorted((*OV_COCO.base, *OV_COCO.novel, *OV_COCO_UNUSED))
    unused = [category_id for category_id, _ in OV_COCO_UNUSED]
    image_of = {i: 17 + n % 3 if i in unused else n % 17 for n, (i, _) in enumerate(classes)}
    return {
        "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in classes],
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "coco_url": f"u/val2017/{n}.jpg", "height": 50, "width": 60}
            for n in range(20)
        ],
        "annotations": [
            {
                "id": 100 + i,
                "image_id": image_of[i],
                "category_id": i,
                "bbox": [i / 4, 1.5, 9.0, 0.0 if i == 90 else 8.0],
                "iscrowd": int(i == 1),
            }
            for i, _ in classes
        ],
    }


def shuffled(data, random):
    return {key: random.sample(value, len(value)) if isinstance(value, list) else value for key, value in data.items()}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([ovr_cnn, regionclip, detic, wusize, vldet, oadp]), st.randoms(use_true_random=False))
def test_the_order_of_the_lists_changes_no_layout_and_no_content(imitate, random):
    data = imitate(toy_coco(), ALL)
    mixed = shuffled(data, random)
    layouts = [recognise(each, "toy") for each in (data, mixed)]
    assert layouts[0] == layouts[1]
    official_way = filter_coco_json(shuffled(toy_coco(), random), BASE)
    imported = filter_coco_json(to_coco_ids(mixed, layouts[1]), BASE)
    assert content(imported[0]) == content(official_way[0])
    assert {key: imported[1][key] for key in ("images", "crowds", "degenerate")} == {
        "images": len({entry["image_id"] for entry in official_way[0]["annotations"]}),
        "crowds": 1,
        "degenerate": [190],
    }


# --- published counts ------------------------------------------------------------------------------------------------


def test_a_file_of_the_official_size_must_leave_the_published_counts(official, tmp_path, monkeypatch, capsys):
    script = load_script("prepare_ov_coco")
    for subset, data in official.items():
        write(tmp_path / f"instances_{subset}.json", data)
    monkeypatch.setitem(script.OFFICIAL, TRAIN, Official(64, 470, {"images": 60}))
    monkeypatch.setitem(script.OFFICIAL, VAL, Official(42, 366, {"images": 39}))
    with pytest.raises(
        DataError, match="(?s)size of the official file, but 38 images remain where 39 images are published"
    ):
        script.main(["--json", str(tmp_path)])
    assert "as published: 60 images" in capsys.readouterr().out
    assert not (tmp_path / VAL).exists()
    monkeypatch.setitem(script.OFFICIAL, VAL, Official(5_000, 366, {"images": 39}))
    script.main(["--json", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "not the official file: 42 images, 366 annotations were read, the official one has 5,000 and 366" in printed
    assert f"{tmp_path / TRAIN}: already up to date" in printed and f"{tmp_path / VAL}: written" in printed


@pytest.mark.parametrize("key", ["base_images", "novel_images"])
def test_images_with_base_and_with_novel_classes_must_be_those_published(key, official, tmp_path, monkeypatch, capsys):
    """Of coco_mini, counted here image by image; one image fewer is refused."""
    script, data = load_script("prepare_ov_coco"), official["val2017"]
    for subset in official:
        write(tmp_path / f"instances_{subset}.json", official[subset])
    counts = {"images": 0, "base_images": 0, "novel_images": 0}
    for image in data["images"]:
        present = {entry["category_id"] for entry in data["annotations"] if entry["image_id"] == image["id"]}
        counts["images"] += bool(present & set(ALL))
        counts["base_images"] += bool(present & set(BASE))
        counts["novel_images"] += bool(present & set(NOVEL))
    assert counts["images"] < counts["base_images"] + counts["novel_images"]  # some images have both
    size = len(data["images"]), len(data["annotations"])
    monkeypatch.setitem(script.OFFICIAL, VAL, Official(*size, {**counts, key: counts[key] + 1}))
    with pytest.raises(DataError, match=f"{counts[key]} {key.replace('_', ' ')}.* where .*{counts[key] + 1} {key[:4]}"):
        script.main(["--json", str(tmp_path)])
    assert not (tmp_path / VAL).exists()
    monkeypatch.setitem(script.OFFICIAL, VAL, Official(*size, counts))
    script.main(["--json", str(tmp_path)])
    stated = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    assert f"as published: {stated}" in capsys.readouterr().out


def test_the_files_made_of_a_part_of_coco_are_known_by_their_hash(official, tmp_path):
    """SHA-256 of the files that coco_mini gives, whose source is written with the same characters everywhere."""
    for subset in official:
        write(tmp_path / f"instances_{subset}.json", official[subset])
    made = {path.name: files.sha256_file(path) for path, _ in prepare_split(tmp_path, "ov_coco", OV_COCO)}
    assert made == HASHES


def test_the_published_counts_are_those_of_the_papers():
    coco, lvis = load_script("prepare_ov_coco").OFFICIAL, load_script("prepare_ov_lvis").OFFICIAL
    assert coco[TRAIN] == Official(118_287, 860_001, {"images": 107_761})
    assert coco[VAL] == Official(5_000, 36_781, {"images": 4_836, "base_images": 4_533, "novel_images": 2_064})
    train = lvis["lvis_v1_train.json"]
    assert (train.images, train.annotations) == (100_170, 1_270_141)
    assert train.filtered_counts == {
        "images": 100_170,
        "base_annotations": 1_264_884,
        "base_classes": 866,
        "novel_classes": 337,
    }


def test_an_import_says_whether_it_has_the_published_number_of_images(official, tmp_path, monkeypatch, capsys):
    script = load_script("prepare_ov_coco")
    monkeypatch.setitem(script.OFFICIAL, TRAIN, Official(64, 470, {"images": 60}))
    sources = [
        str(write(tmp_path / "a.json", vldet(official["train2017"], BASE))),
        str(write(tmp_path / "b.json", detic(official["val2017"], ALL))),
    ]
    script.main(["--root", str(tmp_path), "--from", *sources])
    printed = capsys.readouterr().out
    assert f"from {sources[0]}: VLDet (_del) layout (65 categories numbered 1 to 65 in COCO's order)" in printed
    assert "as published: 60 images" in printed
    assert "the published file has 4,836 images: the source is a part of it, or was changed" in printed
    assert (tmp_path / "annotations" / TRAIN).is_file() and (tmp_path / "annotations" / VAL).is_file()
    script.main(["--root", str(tmp_path), "--from", *sources])
    assert capsys.readouterr().out.count("already up to date") == 2


# --- atomic, and only when needed ------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    """Folder where the toy was prepared, and its two files with their bytes."""
    for subset in ("train2017", "val2017"):
        write(tmp_path / f"instances_{subset}.json", toy_coco())
    made = [path for path, _ in prepare_split(tmp_path, "ov_coco", OV_COCO)]
    return tmp_path, {path: path.read_bytes() for path in made}


def test_the_text_is_that_of_json_dumps_and_is_not_written_again(prepared):
    folder, before = prepared
    times = {path: path.stat().st_mtime_ns for path in before}
    for path, text in before.items():
        assert text.decode() == json.dumps(json.loads(text), ensure_ascii=False) + "\n"
    for path, report in prepare_split(folder, "ov_coco", OV_COCO):
        assert not report["written"]
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (before[path], times[path])


def changed_source(folder):
    """Make the next preparation differ from the last one."""
    data = toy_coco()
    data["annotations"][0]["bbox"][0] += 1
    write(folder / "instances_train2017.json", data)


def test_a_full_disk_leaves_the_old_file_and_no_part_of_the_new_one(prepared, monkeypatch):
    folder, before = prepared
    changed_source(folder)
    pieces = prepare._pieces

    def disk_full(data, description):
        for number, piece in enumerate(pieces(data, description)):
            if number == 30 and description.startswith("writing"):
                raise OSError(errno.ENOSPC, "No space left on device")
            yield piece

    monkeypatch.setattr(prepare, "_pieces", disk_full)
    with pytest.raises(SetupError, match="file system is full.*No space"):
        list(prepare_split(folder, "ov_coco", OV_COCO))
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["instances_train2017.json", "instances_val2017.json", TRAIN, VAL]
    )
    monkeypatch.undo()
    assert [report["written"] for _, report in prepare_split(folder, "ov_coco", OV_COCO)] == [True, False]


def test_a_killed_preparation_leaves_the_old_file_and_the_next_one_finishes(prepared):
    folder, before = prepared
    changed_source(folder)

    def die_before_the_rename():
        files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        list(prepare_split(folder, "ov_coco", OV_COCO))

    child = multiprocessing.get_context("fork").Process(target=die_before_the_rename)
    child.start()
    child.join(timeout=20)
    assert child.exitcode == -signal.SIGKILL
    assert {path: path.read_bytes() for path in before} == before
    assert [report["written"] for _, report in prepare_split(folder, "ov_coco", OV_COCO)] == [True, False]


# --- OV-LVIS ---------------------------------------------------------------------------------------------------------

FREQUENCY = {2: "f", 3: "r", 5: "c", 8: "r", 9: "f", 40: "c"}


def toy_lvis():
    """LVIS v1 style: coco_url for file_name, rare classes in both federated lists, an image with rare boxes alone."""
    image_of = {11: (2, 5), 12: (3, 3, 9), 13: (8,), 14: ()}
    annotations = [
        {"id": 70 + 10 * image_id + n, "image_id": image_id, "category_id": category_id, "bbox": [n, 2.5, 6.0, 7.0]}
        for image_id, classes in image_of.items()
        for n, category_id in enumerate(classes)
    ]
    negatives = {11: [3, 9, 8], 12: [2, 8], 13: [3], 14: [40, 3, 2]}
    not_exhaustive = {11: [5], 12: [3, 9], 13: [8], 14: []}
    return {
        "info": {"version": "toy"},
        "categories": [
            {"id": i, "name": f"class_{i}", "frequency": frequency, "synonyms": [f"{i}"], "image_count": i}
            for i, frequency in FREQUENCY.items()
        ],
        "images": [
            {
                "id": i,
                "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
                "height": 40,
                "width": 50,
                "neg_category_ids": negatives[i],
                "not_exhaustive_category_ids": not_exhaustive[i],
            }
            for i in image_of
        ],
        "annotations": annotations,
    }


def test_ov_lvis_drops_rare_annotations_and_rare_negatives_alone():
    data = toy_lvis()
    before = copy.deepcopy(data)
    split = frequency_split(data["categories"])
    filtered, report = filter_lvis_json(data, split)
    assert data == before
    assert split.base == ((2, "class_2"), (5, "class_5"), (9, "class_9"), (40, "class_40"))
    assert split.novel == ((3, "class_3"), (8, "class_8"))
    assert filtered["annotations"] == [
        entry for entry in before["annotations"] if FREQUENCY[entry["category_id"]] != "r"
    ]
    assert filtered["categories"] == before["categories"] and filtered["info"] == before["info"]
    assert [image["neg_category_ids"] for image in filtered["images"]] == [[9], [2], [], [40, 2]]
    for image, original in zip(filtered["images"], before["images"], strict=True):
        assert {**image, "neg_category_ids": None} == {**original, "neg_category_ids": None}
    expected = {"images": 4, "annotations": 3, "categories": 6, "base_classes": 4, "novel_classes": 2}
    expected |= {"negatives_masked": 5, "images_read": 4, "annotations_read": 6, "base_annotations": 3}
    assert {key: report[key] for key in expected} == expected


def test_a_base_box_without_area_is_dropped_but_counts_as_the_papers_count():
    data = toy_lvis()
    data["annotations"][0]["bbox"][2] = 0
    _, report = filter_lvis_json(data, frequency_split(data["categories"]))
    assert (report["annotations"], report["base_annotations"], report["degenerate"]) == (2, 3, [180])


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_an_lvis_json_does_not_matter(random):
    data, mixed = toy_lvis(), shuffled(toy_lvis(), random)
    split = frequency_split(mixed["categories"])
    assert split == frequency_split(data["categories"])
    (once, first), (again, second) = filter_lvis_json(data, split), filter_lvis_json(mixed, split)
    assert first == second
    for key in ("images", "annotations", "categories"):
        assert sorted(once[key], key=lambda record: record["id"]) == sorted(again[key], key=lambda record: record["id"])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_novel_id_is_trained_on_whatever_is_rare(draw):
    data = toy_lvis()
    for category in data["categories"][1:]:
        category["frequency"] = draw.draw(st.sampled_from("rcf"))
    ids = st.lists(st.sampled_from(list(FREQUENCY)), unique=True)
    for image in data["images"]:
        image["neg_category_ids"] = draw.draw(ids)
    for entry in data["annotations"]:
        entry["category_id"] = draw.draw(st.sampled_from(list(FREQUENCY)))
    rare = {category["id"] for category in data["categories"] if category["frequency"] == "r"}
    filtered, _ = filter_lvis_json(data, frequency_split(data["categories"]))
    assert not rare & {entry["category_id"] for entry in filtered["annotations"]}
    assert not rare & {negative for image in filtered["images"] for negative in image["neg_category_ids"]}
    base = [entry for entry in data["annotations"] if entry["category_id"] not in rare]
    assert filtered["annotations"] == base and len(filtered["images"]) == 4


SPOILED = {
    "no frequency": (lambda data: data["categories"][2].pop("frequency"), "without id, name or frequency.*id 5"),
    "odd frequency": (lambda data: data["categories"][2].update(frequency="x"), "frequency f, c or r, id 5"),
    "no name": (lambda data: data["categories"][2].pop("name"), "without id, name or frequency.*id 5"),
    "id twice": (lambda data: data["categories"][2].update(id=2), "category id 2 twice"),
    "all rare": (lambda data: [category.update(frequency="r") for category in data["categories"]], "no base class"),
    "no negatives": (lambda data: data["images"][1].pop("neg_category_ids"), "without neg_category_ids.*id 12"),
    "no list": (lambda data: data["images"][3].pop("not_exhaustive_category_ids"), "not_exhaustive.*id 14"),
    "no annotations": (lambda data: data.pop("annotations"), "no list 'annotations'"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_what_is_not_of_lvis_is_refused(case, tmp_path):
    spoil, message = SPOILED[case]
    data = toy_lvis()
    spoil(data)
    source = write(tmp_path / "lvis.json", data)
    with pytest.raises(DataError, match=message) as caught:
        prepare_lvis_train(source, tmp_path / "out.json", "download it")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "out.json").exists()


def test_ov_lvis_script(tmp_path, monkeypatch, capsys):
    script = load_script("prepare_ov_lvis")
    folder = tmp_path / "lvis"
    write(folder / "lvis_v1_train.json", toy_lvis())
    kept = {"images": 4, "base_annotations": 3, "base_classes": 4, "novel_classes": 2}
    monkeypatch.setitem(script.OFFICIAL, "lvis_v1_train.json", Official(4, 6, {**kept, "novel_classes": 3}))
    with pytest.raises(DataError, match="2 novel classes remain where .* 3 novel classes are published"):
        script.main(["--root", str(folder)])
    assert not (folder / "ov_lvis_train_base.json").exists()
    monkeypatch.setitem(script.OFFICIAL, "lvis_v1_train.json", Official(4, 6, kept))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    script.main([])
    printed = capsys.readouterr().out
    assert "ov_lvis_train_base.json: written\n  4 images, 3 annotations of 4 base classes; 6 categories" in printed
    assert "5 novel classes removed from the negatives" in printed and "as published: 4 images, 3 base ann" in printed
    assert "lvis_v1_val.json: missing; required for testing" in printed
    for subset in ("val", "minival"):
        write(folder / f"lvis_v1_{subset}.json", toy_lvis())
    monkeypatch.setitem(script.OFFICIAL, "lvis_v1_val.json", Official(4, 6, {"images_read": 4}))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    script.main(["--json", str(folder)])
    printed = capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "ov_lvis_train_base.json: already up to date" in printed
    assert (
        "lvis_v1_val.json: used unchanged\n  4 images, 6 annotations, 3 of novel classes\n  as published: 4 images"
        in printed
    )
    assert "lvis_v1_minival.json: used unchanged" in printed
    write(folder / "lvis_v9_train.json", toy_lvis())
    script.main(["--json", str(folder), "--version", "v9"])
    made, other = read(folder / "ov_lvis_v9_train_base.json"), read(folder / "ov_lvis_train_base.json")
    assert content(made) == content(other)


def test_a_test_file_of_other_classes_is_refused(tmp_path):
    split = frequency_split(toy_lvis()["categories"])
    for key, value, named in (("name", "other", "other"), ("frequency", "r", "class_2")):
        data = toy_lvis()
        data["categories"][0][key] = value
        with pytest.raises(DataError, match=f"(?s)val.json has other classes.*{named}.*one version of LVIS"):
            check_lvis_test(write(tmp_path / "val.json", data), split, "download it")


def test_a_missing_lvis_ends_with_exit_code_3_and_says_where_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_ov_lvis.py", "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "datasets" / "prepare_ov_lvis.py"), run_name="__main__")
    assert ended.value.code == 3
    complaint = capsys.readouterr().err
    assert "lvis_v1_train.json does not exist" in complaint and "lvisdataset.org" in complaint


@needs_lvis_fixture
def test_lvis_v05_through_the_same_code(tmp_path):
    original = read(LVIS_FIXTURE)
    split, report = prepare_lvis_train(LVIS_FIXTURE, tmp_path / "out.json", "")
    made = read(tmp_path / "out.json")
    rare = {category["id"] for category in original["categories"] if category["frequency"] == "r"}
    assert (len(split.base), len(split.novel), len(made["categories"])) == (315 + 461, 454, 1230)
    assert (report["images"], report["annotations"], report["negatives_masked"]) == (100, 976, 161)
    assert made["annotations"] == [entry for entry in original["annotations"] if entry["category_id"] not in rare]
    assert not rare & {negative for image in made["images"] for negative in image["neg_category_ids"]}
    assert sum(len(image["neg_category_ids"]) for image in made["images"]) == 441 + 340
    assert check_lvis_test(LVIS_FIXTURE, split, "")["novel_annotations"] == 1


def test_ov_shapes_in_lvis_form_goes_the_same_way(tmp_path):
    from ovdet2.data.datasets.ov_shapes import OV_SHAPES, ensure_generated

    ensure_generated(tmp_path, counts={"train2017": 12, "val2017": 4}, workers=1)
    folder = tmp_path / "ov_shapes" / "annotations"
    load_script("prepare_ov_lvis").main(["--json", str(folder)])
    split = frequency_split(read(folder / "lvis_v1_train.json")["categories"])
    assert {i for i, _ in split.novel} == {i for i, _ in OV_SHAPES.novel}
    made, base_file = read(folder / "ov_lvis_train_base.json"), read(folder / "ov_shapes_train_base.json")
    by_id = {entry["id"]: (entry["image_id"], entry["category_id"], entry["bbox"]) for entry in made["annotations"]}
    assert by_id == {
        entry["id"]: (entry["image_id"], entry["category_id"], entry["bbox"]) for entry in base_file["annotations"]
    }


# --- ids and empty files ---------------------------------------------------------------------------------------------


def _each_id(form):
    def spoil(data):
        for record in data["categories"]:
            record["id"] = form(record["id"])
        for box in data["annotations"]:
            box["category_id"] = form(box["category_id"])

    return spoil


def _first(key, field, value):
    return lambda data: data[key][0].update({field: value})


ODD_IDS = {
    "all text": _each_id(str),
    "floats": _each_id(float),
    "a category without": lambda data: data["categories"][0].pop("id"),
    "an annotation of a list": _first("annotations", "category_id", [1]),
    "an annotation of a dict": _first("annotations", "image_id", {"a": 1}),
    "an annotation of text": _first("annotations", "category_id", "1"),
    "an image of a list": _first("images", "id", [1]),
    "an image above 64 bits": _first("images", "id", 2**63),
    "a boolean": _first("annotations", "id", True),
}


@pytest.mark.parametrize("case", ODD_IDS)
def test_odd_ids_are_refused_by_every_preparation(case, tmp_path):
    coco, lvis = toy_coco(), lvis_like(toy_coco())
    for data in (coco, lvis):
        ODD_IDS[case](data)
    folder = tmp_path / "coco"
    for subset in ("train2017", "val2017"):
        write(folder / f"instances_{subset}.json", coco)
    train, copied = write(tmp_path / "lvis.json", lvis), write(tmp_path / "val2017.json", coco)
    split = frequency_split(lvis_like(toy_coco())["categories"])
    out = tmp_path / "out"
    for action in (
        lambda: list(prepare_split(folder, "ov_coco", OV_COCO)),
        lambda: prepare_lvis_train(train, out / "train.json", "x"),
        lambda: check_lvis_test(train, split, "x"),
        lambda: list(import_ov_coco([copied], out, UNCHECKED)),
    ):
        with pytest.raises(DataError, match="not a 64-bit integer|without id, name|without an integer id"):
            action()
    assert not out.exists() and not list(folder.glob("ov_coco*"))


def lvis_like(data):
    for category in data["categories"]:
        category["frequency"] = "r" if category["id"] > 50 else "f"
    for image in data["images"]:
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return data


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_no_file_without_images_or_annotations_is_written(key, tmp_path):
    """The images of the annotations are not in the file, or no annotation is of a wanted category."""
    coco = toy_coco()
    coco[key] = []
    for subset in ("train2017", "val2017"):
        write(tmp_path / f"instances_{subset}.json", coco)
    with pytest.raises(DataError, match="would have 0 images .* nothing was written"):
        list(prepare_split(tmp_path, "ov_coco", OV_COCO))
    lvis = lvis_like(toy_coco())
    lvis[key] = []
    with pytest.raises(DataError, match=f"0 {key}"):
        prepare_lvis_train(write(tmp_path / "lvis.json", lvis), tmp_path / "ov_lvis.json", "x")
    assert not list(tmp_path.glob("ov_*"))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    coco = toy_coco()
    for subset in ("train2017", "val2017"):
        path = tmp_path / f"instances_{subset}.json"
        path.write_text("\ufeff" + json.dumps(coco), encoding="utf-8")
    counts = [report["images"] for _, report in prepare_split(tmp_path, "ov_coco", OV_COCO)]
    for subset in ("train2017", "val2017"):
        write(tmp_path / f"instances_{subset}.json", coco)
    assert counts == [report["images"] for _, report in prepare_split(tmp_path, "ov_coco", OV_COCO)]
