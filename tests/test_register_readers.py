"""Registered data sets without boxes: one call, entries of DATASETS.OWN, COCO's and OV-Shapes' captions."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.config import get_cfg, load_config
from ovdet2.data.datasets import register_captions, register_image_labels, split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.lvis_split import frequency_split
from ovdet2.data.datasets.ov_shapes_captions import ensure_captions
from ovdet2.data.datasets.own import register_own
from ovdet2.data.samples import BOXES, CAPTIONS, IMAGE_LABELS
from ovdet2.engine import Trainer
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_json
from ovdet2.io.images import read_image
from ovdet2.ov_shapes.world.captions import caption_pair
from tests.caption_cases import image_of, make_shards, make_tsv, write_coco
from tests.test_image_labels import SPLIT, labelled, tree

MINI = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini"


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.fixture
def forget():
    """A function of names; they are free again after the test."""
    names = []
    yield lambda name: names.append(name) or name
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def test_built_in_data_sets_have_a_kind():
    kinds = {
        "ov_coco_train_base": BOXES,
        "transfer_voc_2007_test": BOXES,
        "coco_captions_train": CAPTIONS,
        "coco_captions_val": CAPTIONS,
        "ov_shapes_captions": CAPTIONS,
    }
    assert {name: MetadataCatalog.get(name).ov_kind for name in kinds} == kinds
    assert split_of("coco_captions_train") is None


@pytest.mark.parametrize("format", ["coco", "tsv", "tar"])
def test_captions_in_one_call(format, root, forget):
    name = forget(f"captions_{format}")
    if format == "tar":
        make_shards(root, per_shard=(2, 3))
        register_captions(name, "*.tar", format="tar")
    elif format == "tsv":
        make_tsv(root, 5)
        register_captions(name, "pairs.tsv", "images", "tsv")
    else:
        write_coco(root, 5)
        register_captions(name, "captions.json", "images")
    records = DatasetCatalog.get(name)
    assert len(records) == 5 and all("number 3" in text for text in records[3]["captions"])
    assert np.array_equal(read_image(records[3]["file_name"]), image_of(3))
    assert MetadataCatalog.get(name).ov_files()[0] == root / {"tar": "*.tar", "tsv": "pairs.tsv"}.get(format, "captions.json")  # fmt: skip
    with pytest.raises(UsageError, match="registered already"):
        register_captions(name, "captions.json", "images")


def test_wrong_registrations_of_captions(root, forget):
    with pytest.raises(UsageError, match="'parquet': choose one of coco, tsv, tar"):
        register_captions("wrong", "a", "b", "parquet")
    with pytest.raises(UsageError, match="'coco' have the image folder None"):
        register_captions("wrong", "a.json")
    with pytest.raises(UsageError, match="none for tar"):
        register_captions("wrong", "*.tar", "images", "tar")
    register_captions(forget("lacking"), "a.json", "images", remedy="download it")
    with pytest.raises(DataError, match="data set 'lacking': .*a.json does not exist. Remedy: download it"):
        DatasetCatalog.get("lacking")
    data = write_coco(root, 4)
    data["annotations"] = data["annotations"][1:4]
    write_json(root / "captions.json", data)
    register_captions(forget("few"), "captions.json", "images")
    assert len(DatasetCatalog.get("few")) == 3
    register_captions(forget("strict"), "captions.json", "images", max_bad=0)
    with pytest.raises(DataError, match="captions.json has 1 faulty.*image 100.*raise max_bad"):
        DatasetCatalog.get("strict")


@pytest.mark.parametrize("classes", ["split", "names", "function"])
def test_image_labels_of_a_json_in_one_call(classes, root, forget):
    write_json(root / "labels.json", labelled(4))
    name, options = forget(f"labels_{classes}"), {}
    split = SPLIT
    if classes == "names":
        split, options = ["pear", "apple"], {"novel_names": ["quince"]}
    if classes == "function":

        def split(categories, source):
            return Split("read", *SPLIT_PARTS) if len(categories) == 3 else pytest.fail(str(source))

        SPLIT_PARTS = SPLIT.base, SPLIT.novel
    register_image_labels(name, "labels.json", ".", split, **options)
    assert (split_of(name).base, split_of(name).novel) == (SPLIT.base, SPLIT.novel)
    assert [record["labels"] for record in DatasetCatalog.get(name)] == [(1,), (0,), (0, 1), (1,)]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["pear", "apple", "quince"] and metadata.ov_image_counts == [2, 3, 0]
    assert (metadata.ov_kind, metadata.ov_novel_labels) == (IMAGE_LABELS, False)


def test_image_labels_of_lvis_frequencies(root, forget):
    data = labelled()
    for category, frequency in zip(data["categories"], "rcf"):
        category |= {"frequency": frequency}
    write_json(root / "labels.json", data | {"annotations": []})
    register_image_labels(forget("lvis_labels"), "labels.json", ".", frequency_split)
    assert [name for _, name in split_of("lvis_labels").novel] == ["quince"]
    assert len(DatasetCatalog.get("lvis_labels")) == 3


def test_image_labels_of_folders_in_one_call(root, forget):
    (root / "train").mkdir()
    tree(root / "train", n01=2, n02=1)
    write_json(root / "folders.json", {"n02": "pear", "n01": "quince"})
    register_image_labels(forget("refused"), "folders.json", "train", ["pear"], novel_names=["quince"])
    with pytest.raises(DataError, match="folders.json holds 1 folders of novel classes of refused, first n01"):
        DatasetCatalog.get("refused")
    register_image_labels(forget("meant"), "folders.json", "train", ["pear"], novel_names=["quince"], novel_labels=True)
    assert split_of("meant").base == ((0, "pear"),) and split_of("meant").novel == ((1, "quince"),)
    assert [record["labels"] for record in DatasetCatalog.get("meant")] == [(1,), (1,), (0,)]
    assert MetadataCatalog.get("meant").ov_novel_labels
    register_image_labels(forget("named"), None, "train", ["n01", "n02"])
    assert [record["labels"] for record in DatasetCatalog.get("named")] == [(0,), (0,), (1,)]
    register_image_labels(forget("read"), None, "train", frequency_split)
    with pytest.raises(UsageError, match="give their split"):
        DatasetCatalog.get("read")
    with pytest.raises(UsageError, match="give a Split, or lists of names"):
        register_image_labels("wrong", None, "train", SPLIT, novel_names=["plum"])


def own_cfg(*entries):
    cfg = get_cfg()
    cfg.DATASETS.OWN = list(entries)
    return cfg


def test_own_data_of_each_kind(root, forget):
    write_coco(root, 3)
    make_shards(root)
    write_json(root / "labels.json", labelled())
    entries = (
        {"name": forget("own_c"), "kind": "captions", "captions": "captions.json", "images": "images"},
        {"name": forget("own_t"), "kind": "captions", "captions": "*.tar", "format": "tar", "index_file": "i.safetensors"},
        {"name": forget("own_l"), "kind": "image_labels", "labels": "labels.json", "images": ".", "base": ["pear", "apple"]},
    )  # fmt: skip
    register_own(own_cfg(*entries))
    register_own(own_cfg(*entries))  # again, as by a second configuration
    assert [len(DatasetCatalog.get(entry["name"])) for entry in entries] == [3, 7, 3]
    assert (root / "i.safetensors").is_file()
    with pytest.raises(UsageError, match="registered already"):
        register_own(own_cfg(entries[0] | {"max_bad": 3}))


def test_own_data_from_a_yaml_file(root, forget, tmp_path):
    write_coco(root, 3)
    (tmp_path / "a.yaml").write_text(
        f"DATASETS:\n  OWN:\n    - {{kind: captions, name: {forget('own_y')}, captions: captions.json, images: images}}\n"
    )
    load_config(tmp_path / "a.yaml", [])
    assert len(DatasetCatalog.get("own_y")) == 3


@pytest.mark.parametrize(
    "entry, named",
    [
        ({"kind": "masks", "name": "x"}, "of kind 'masks': choose one of boxes, captions, image_labels"),
        (
            {"kind": "captions", "name": "x", "file": "a"},
            "entry 0 of DATASETS.OWN, 'x', has the unknown key 'file' .*and lacks 'captions'. A captions entry is {name, captions}",
        ),
        ({"kind": "captions", "name": "x", "captions": "a", "base": []}, "has the unknown key 'base'. A captions"),
        ({"name": "x", "json": "a", "imagse": "b", "base": []}, "unknown key 'imagse' .did you mean images?"),
        ({"kind": "image_labels", "name": "x"}, "'x', lacks 'images' and lacks 'base'. An? image_labels entry is"),
        (
            {"name": "x", "captions": "a"},
            "unknown key 'captions' and .*A boxes entry is {name, json, images, base}, .*kinds: boxes, captions, image_l",
        ),
        (
            "x",
            "entry 0 of DATASETS.OWN is 'x', not a dict. A boxes entry is {name, json, images, base}, optionally with nov",
        ),
        (["x"], "is .'x'., not a dict"),
    ],
)
def test_entries_of_own_data_that_are_none(entry, named):
    with pytest.raises(UsageError, match=named):
        register_own(own_cfg(entry))


def test_data_without_boxes_is_not_evaluated():
    with pytest.raises(UsageError, match="coco_captions_val has evaluator type 'captions'"):
        Trainer.build_evaluator(get_cfg(), "coco_captions_val")


def test_captions_of_ov_shapes(root, caplog):
    """A smaller set of the same recipe is kept; its images are those of the full one, as JPEG files."""
    path, folder = ensure_captions(root, 4, workers=1)
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        records = DatasetCatalog.get("ov_shapes_captions")
    assert "captions_4x5.json instead of the 10000 images" in caplog.text and path.read_bytes() == before
    assert len(records) == 4 and records.num_texts == 20 and len(list(folder.glob("*.jpg"))) == 4
    for index, record in enumerate(records):
        image, caption, scene = caption_pair(0, index)
        assert record["captions"][0] == caption and len(record["captions"]) == 5
        assert all(placed.shape in text for placed in scene.objects for text in record["captions"])
        assert np.abs(read_image(record["file_name"]).astype(int) - image).mean() < 6  # JPEG
    ensure_captions(root, 5, 2, workers=1)  # of another recipe
    assert len(DatasetCatalog.get("ov_shapes_captions")) == 4
    ensure_captions(root, 6, workers=1)
    larger = DatasetCatalog.get("ov_shapes_captions")
    assert len(larger) == 6 and larger[3] == records[3]
    write_json(path.with_name("captions_20000x5.json"), {})  # more than the data set has: not looked at
    assert len(DatasetCatalog.get("ov_shapes_captions")) == 6
    with pytest.raises(UsageError, match="not 0 x 5"):
        ensure_captions(root, 0)


def test_captions_of_ov_shapes_are_drawn_on_first_use(root, monkeypatch):
    from ovdet2.data.datasets import ov_shapes_captions

    monkeypatch.setattr(ov_shapes_captions, "draw_captions", lambda folder, count, each, workers: [folder, count, each])
    monkeypatch.setattr(ov_shapes_captions, "write_json", lambda path, value: path.write_text(json.dumps(str(value))))
    with pytest.raises(DataError, match="captions_10000x5.json is no COCO-captions json"):
        DatasetCatalog.get("ov_shapes_captions")
    assert "10000, 5]" in (root / "ov_shapes" / "captions" / "captions_10000x5.json").read_text()


@pytest.mark.skipif(not MINI.is_dir(), reason="../shared/data/coco_mini is absent")
@pytest.mark.parametrize("part", ["train", "val"])
def test_captions_of_coco(part, root, forget):
    """COCO's own files by their registered names; coco_mini has captions of some of its images only."""
    (root / "coco").mkdir()
    (root / "coco" / f"{part}2017").symlink_to(MINI / f"{part}2017")
    (root / "coco" / "annotations").symlink_to(MINI / "annotations")
    source = json.loads((MINI / "annotations" / f"captions_{part}2017.json").read_text())
    captioned = {entry["image_id"] for entry in source["annotations"]}
    name = forget(f"mini_{part}")
    register_captions(
        name, f"coco/annotations/captions_{part}2017.json", f"coco/{part}2017", max_bad=len(source["images"])
    )
    records = DatasetCatalog.get(name)
    assert {record["image_id"] for record in records} == captioned and records.num_texts == len(source["annotations"])
    for record in records:
        assert len(record["captions"]) >= 5 and read_image(record["file_name"]).shape[:2] == (record["height"], record["width"])  # fmt: skip
    built_in = MetadataCatalog.get(f"coco_captions_{part}").ov_files()
    assert built_in == MetadataCatalog.get(name).ov_files()
