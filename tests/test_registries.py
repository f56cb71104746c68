"""The registered benchmarks: what reaches training, how classes are told apart, transfer targets."""

import json
import uuid

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ovdet2.config import get_cfg, load_config
from ovdet2.data.datasets import register_ov_dataset, split_of
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.data.loader import build_train_loader
from ovdet2.data.records import load_records
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.errors import DataError, UsageError
from tests.processes import run_program

SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]


def prepare(program, root):
    """Run a program of datasets/ on a folder."""
    done = run_program(f"datasets/{program}", "--root", root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def truth(categories, folder, lvis=False):
    """A fully annotated json of 6 images and every category, novel ones included, and the image files."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id in range(1, 7):
        name = f"{image_id:012d}.jpg"
        Image.fromarray(np.full((48, 64, 3), 40 * image_id, dtype=np.uint8)).save(folder / name)
        address = {"coco_url": f"http://images/{folder.name}/{name}"} if lvis else {"file_name": name}
        negatives = {"neg_category_ids": [c["id"] for c in categories], "not_exhaustive_category_ids": []}
        images.append({"id": image_id, "height": 48, "width": 64, **address, **(negatives if lvis else {})})
    for number, category in enumerate(categories):
        box = {"bbox": [2, 2, 10, 10], "area": 100, "iscrowd": 0, "segmentation": SQUARE}
        annotations.append({"id": number + 1, "image_id": 1 + number % 6, "category_id": category["id"], **box})
    return {"images": images, "annotations": annotations, "categories": categories}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def coco_world(root):
    """OV-COCO made of an imitation of the official jsons; returns the fully annotated training json."""
    pairs = sorted((*OV_COCO.base, *OV_COCO.novel, *OV_COCO_UNUSED))
    categories = [{"id": category_id, "name": name} for category_id, name in pairs]
    whole = truth(categories, root / "coco" / "train2017")
    for part in ("train", "val"):
        write(root / "coco" / "annotations" / f"instances_{part}2017.json", whole)
    (root / "coco" / "val2017").symlink_to(root / "coco" / "train2017")
    prepare("prepare_ov_coco.py", root / "coco")
    return whole, root / "coco" / "annotations" / "ov_coco_train_base.json"


def lvis_world(root):
    """OV-LVIS likewise, of 9 classes."""
    categories = [{"id": 3 * i + 1, "name": f"thing_{i}", "frequency": "fcr"[i % 3]} for i in range(9)]
    whole = truth(categories, root / "coco" / "train2017", lvis=True)
    for part in ("train", "val"):
        write(root / "lvis" / f"lvis_v1_{part}.json", whole)
    prepare("prepare_ov_lvis.py", root / "lvis")
    return whole, root / "lvis" / "ov_lvis_train_base.json"


def shapes_world(root, name="ov_shapes_train_base.json", source="instances_train2017.json"):
    ensure_generated(root, counts={"train2017": 12, "val2017": 3}, workers=1)
    folder = root / "ov_shapes" / "annotations"
    return json.loads((folder / source).read_text()), folder / name


def shapes_lvis_world(root):
    return shapes_world(root, "ov_lvis_train_base.json", "lvis_v1_train.json")


BENCHMARKS = {
    "ov_coco_train_base": (coco_world, "ov_coco_val_all"),
    "ov_lvis_train_base": (lvis_world, "ov_lvis_val"),
    "ov_shapes_train_base": (shapes_world, "ov_shapes_val_all"),
    "ov_shapes_lvis_train_base": (shapes_lvis_world, "ov_shapes_lvis_val"),
}


def test_every_registered_training_set_has_a_leak_test():
    import ovdet2.data.datasets  # noqa: F401

    ours = {name for name in DatasetCatalog.list() if "train" in name and MetadataCatalog.get(name).get("ov_split")}
    tested = {name for name in ours if not name.startswith(("ov_micro", "test_"))}
    closed = {"closed_coco_2017_train", "closed_lvis_v1_train"}  # whose tests are those of the closed sets
    assert tested == {*BENCHMARKS, *closed}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def training_cfg(name, test):
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TRAIN", (name,), "DATASETS.TEST", (test,), "DATALOADER.NUM_WORKERS", 0])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 1, "INPUT.MIN_SIZE_TRAIN", (48,), "SEED", 1])
    return cfg


@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_novel_annotation_reaches_the_mapper(name, root, monkeypatch):
    world, test = BENCHMARKS[name]
    whole, json_file = world(root)
    split = split_of(name)
    novel_ids = {category_id for category_id, _ in split.novel}
    leaks = {a["id"] for a in whole["annotations"] if a["category_id"] in novel_ids}
    base_ids = {category_id for category_id, _ in split.base}
    trained = {a["id"] for a in whole["annotations"] if a["category_id"] in base_ids}
    assert leaks and trained
    cfg, reached = training_cfg(name, test), set()
    mapper = build_sample_maker(cfg, True)

    def recording(record):
        reached.update(annotation["id"] for annotation in record["annotations"])
        mapped = mapper(record)
        assert mapped["instances"].gt_classes.max() < len(split.base)
        return mapped

    loader = build_train_loader(cfg, recording)
    [source] = loader.sources
    assert not any(novel_ids.intersection(record.get("neg_category_ids", ())) for record in source.records)
    for _ in zip(range(len(source.records)), loader):
        pass
    assert reached == trained
    # The same file with one novel annotation more is refused, whoever wrote it.
    data = json.loads(json_file.read_text())
    intruder = next(
        a for a in whole["annotations"] if a["id"] in leaks and a["image_id"] in {i["id"] for i in data["images"]}
    )
    data["annotations"].append(intruder)
    data["categories"] = whole["categories"]
    json_file.write_text(json.dumps(data))
    with pytest.raises(DataError, match=f"novel classes.* {intruder['id']}"):
        load_records([name], "DATASETS.TRAIN", True, base_only=True)


def test_the_closed_set_has_no_novel_class_and_trains_on_all_others(root):
    whole, _ = coco_world(root)
    cfg, reached = training_cfg("closed_coco_2017_train", "closed_coco_2017_val"), set()
    mapper = build_sample_maker(cfg, True)

    def recording(record):
        reached.update(annotation["id"] for annotation in record["annotations"])
        return mapper(record)

    loader = build_train_loader(cfg, recording)
    for _ in zip(range(len(loader.sources[0].records)), loader):
        pass
    assert reached == {annotation["id"] for annotation in whole["annotations"]}
    for name in ("closed_coco_2017_train", "closed_coco_2017_val"):
        split = split_of(name)
        assert split.novel == () and [category_id for category_id, _ in split.base] == sorted(split.category_ids)
        assert len(split.base) == 80
    # The open-vocabulary benchmark that shares its images has novel classes among these.
    with pytest.raises(DataError, match="novel classes"):
        load_records(["transfer_coco_2017_val"], "DATASETS.TRAIN", False, base_only=True)


def test_the_closed_set_of_lvis_has_rare_classes_among_its_base(root):
    whole, _ = lvis_world(root)
    records = load_records(["closed_lvis_v1_train"], "DATASETS.TRAIN", False, base_only=True)
    assert sum(len(record["annotations"]) for record in records) == len(whole["annotations"])
    split = split_of("closed_lvis_v1_val")
    assert split.novel == () and split.category_ids == tuple(category["id"] for category in whole["categories"])
    assert {kind: len(ids) for kind, ids in split.groups.items()} == {"r": 3, "c": 3, "f": 3}


def test_novel_negatives_of_lvis_are_refused_in_training(root):
    whole, json_file = lvis_world(root)
    data = json.loads(json_file.read_text())
    data["images"][3]["neg_category_ids"].append(7)
    json_file.write_text(json.dumps(data))
    with pytest.raises(DataError, match="neg_category_ids in training data, id 4.*ovdet2 dataset prepare ov-lvis"):
        DatasetCatalog.get("ov_lvis_train_base")


def test_lvis_splits_come_from_the_json(root):
    lvis_world(root)
    split = split_of("ov_lvis_val")
    assert (len(split.base), len(split.novel)) == (6, 3)
    assert {category_id for category_id, _ in split.novel} == {7, 16, 25}
    records = DatasetCatalog.get("ov_lvis_train_base")
    assert records[0]["file_name"] == str(root / "coco" / "train2017" / "000000000001.jpg")
    assert records[0]["annotations"][0]["segmentation"] == SQUARE
    assert records[0]["not_exhaustive_category_ids"] == []
    assert MetadataCatalog.get("ov_lvis_train_base").ov_image_counts == [1, 1, 1, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "segmentation", [None, [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, float("nan")]], {"size": [3]}, "x"]
)
def test_malformed_masks_are_named(segmentation, root):
    _, json_file = lvis_world(root)
    data = json.loads(json_file.read_text())
    data["annotations"][2]["segmentation"] = segmentation
    json_file.write_text(json.dumps(data))
    with pytest.raises(
        DataError, match=f"masks that are missing or malformed, annotation id {data['annotations'][2]['id']}"
    ):
        DatasetCatalog.get("ov_lvis_train_base")


@pytest.mark.parametrize("lists", [{}, {"neg_category_ids": "x"}, {"neg_category_ids": [1.5]}])
def test_missing_federated_lists_are_named(lists, root):
    whole, _ = lvis_world(root)
    image = {key: value for key, value in whole["images"][1].items() if key != "neg_category_ids"} | lists
    write(root / "lvis" / "lvis_v1_val.json", {**whole, "images": [whole["images"][0], image, *whole["images"][2:]]})
    with pytest.raises(DataError, match="neg_category_ids, id 2"):
        DatasetCatalog.get("ov_lvis_val")


@pytest.fixture
def own():
    name = f"test_{uuid.uuid4().hex}"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


FRUIT = [{"id": 9, "name": "pear"}, {"id": 4, "name": "apple"}, {"id": 2, "name": "quince"}]


def test_own_data_by_names(own, root):
    write(root / "fruit.json", truth(FRUIT, root / "images"))
    register_ov_dataset(own, "fruit.json", "images", ["apple", "pear"], ["quince"], masks=True)
    split = split_of(own)
    assert (split.base, split.novel) == (((4, "apple"), (9, "pear")), ((2, "quince"),))
    records = DatasetCatalog.get(own)
    assert [a["category_id"] for r in records for a in r["annotations"]] == [1, 0, 2]
    assert MetadataCatalog.get(own).thing_classes == ["apple", "pear", "quince"]


@pytest.mark.parametrize(
    "base, named",
    [(["apple", "plum"], "no category named 'plum'"), (["apple", "quince"], "2 twice"), ([], "no class")],
)
def test_own_data_with_wrong_names(base, named, own, root):
    write(root / "fruit.json", truth(FRUIT, root / "images"))
    register_ov_dataset(own, "fruit.json", "images", base, ["quince"] if base else [])
    with pytest.raises(UsageError, match=named):
        split_of(own)


def test_a_name_that_the_json_has_twice(own, root):
    write(root / "fruit.json", truth([*FRUIT, {"id": 5, "name": "pear"}], root / "images"))
    register_ov_dataset(own, "fruit.json", "images", ["pear"])
    with pytest.raises(UsageError, match="several categories named 'pear'"):
        DatasetCatalog.get(own)


def test_a_changed_json_is_read_again(own, root):
    write(root / "fruit.json", truth(FRUIT, root / "images"))
    register_ov_dataset(own, "fruit.json", "images", ["pear"])
    assert split_of(own).base == ((9, "pear"),)
    write(root / "fruit.json", truth([{"id": 11, "name": "pear"}], root / "images"))
    assert split_of(own).base == ((11, "pear"),)


def test_unknown_metric(own):
    with pytest.raises(UsageError, match="ov_coco, ov_lvis, ov_voc"):
        register_ov_dataset(own, "a.json", "a", ["x"], metric="coco")


XML = """<annotation><size><width>32</width><height>24</height><depth>3</depth></size>
<object><name>tvmonitor</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>3</ymin><xmax>32</xmax><ymax>12</ymax></bndbox></object>
<object><name>dog</name><difficult>1</difficult>
<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"""


def voc_world(root, xml=XML):
    folder = root / "VOC2007"
    for name, text in (("Annotations/000005.xml", xml), ("ImageSets/Main/test.txt", "000005\n")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "JPEGImages").mkdir()
    Image.fromarray(np.zeros((24, 32, 3), dtype=np.uint8)).save(folder / "JPEGImages" / "000005.jpg")
    return folder


def test_voc_is_a_transfer_target(root):
    printed = prepare("prepare_voc.py", voc_world(root))
    assert "1 images, 1 objects, 1 difficult" in printed and "4,952 and 12,032" in printed
    assert "already up to date" in prepare("prepare_voc.py", root / "VOC2007")
    split = split_of("transfer_voc_2007_test")
    assert len(split.base) == 0 and len(split.novel) == 20 and split.names[-1] == "tv monitor"
    (record,) = DatasetCatalog.get("transfer_voc_2007_test")
    tv, dog = record["annotations"]
    assert (tv["bbox"], tv["area"], tv["category_id"], tv["iscrowd"]) == ([0, 2, 32, 10], 320, 19, 0)
    assert (dog["bbox"], dog["iscrowd"]) == ([4, 4, 5, 5], 1)
    assert MetadataCatalog.get("transfer_voc_2007_test").evaluator_type == "ov_voc"


@pytest.mark.parametrize(
    "spoiled", ["", "<annotation/>", XML.replace("dog", "dodo"), XML.replace("<xmax>32", "<xmax>0")]
)
def test_damaged_voc_files_are_named(spoiled, root):
    from ovdet2.data.datasets.voc import voc_json

    with pytest.raises(DataError, match="000005.xml"):
        voc_json(voc_world(root, spoiled), "test")
    with pytest.raises(DataError, match="val.txt"):
        voc_json(root / "VOC2007", "val")


@pytest.mark.parametrize(
    "name",
    ["transfer_coco_2017_val", "transfer_objects365_v1_val", "transfer_voc_2007_test", "closed_coco_2017_train"],
)
def test_a_missing_data_set_names_its_remedy(name, root):
    with pytest.raises(DataError, match="does not exist. Remedy: "):
        split_of(name)


def test_nobody_trains_on_a_transfer_target(root):
    prepare("prepare_voc.py", voc_world(root))
    with pytest.raises(DataError, match="labels of novel classes"):
        load_records(["transfer_voc_2007_test"], "DATASETS.TRAIN", False, base_only=True)


# --- a user's own data, as datasets/README.md describes it ----------------------------------------------------------


def test_the_readme_from_one_annotated_file_to_batches(own, root):
    from ovdet2.data.datasets.coco_json import filter_coco_json

    whole = truth(FRUIT, root / "images")
    write(root / "test.json", whole)
    write(root / "train.json", filter_coco_json(whole, [9, 4])[0])
    train, test = f"{own}_train", f"{own}_test"
    names = {"base": ["apple", "pear"], "images": "images"}
    options = [
        {"name": train, "json": "train.json", "base_only": True, **names},
        {"name": test, "json": "test.json", "novel": ["quince"], **names},
    ]
    cfg = load_config("", ["DATASETS.OWN", options])
    load_config("", ["DATASETS.OWN", options])  # a second time changes nothing
    try:
        cfg.merge_from_other_cfg(training_cfg(train, test))
        (record,) = next(iter(build_train_loader(cfg)))
        assert record["instances"].gt_classes.tolist() in ([0], [1])
        assert split_of(test).novel == ((2, "quince"),)
        with pytest.raises(UsageError, match="registered already"):
            load_config("", ["DATASETS.OWN", [options[0] | {"json": "other.json"}]])
    finally:
        for name in (train, test):
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)


@pytest.mark.parametrize("entry", ["fruit", {"name": "a", "json": "a.json"}, {"name": "a", "clases": []}])
def test_wrong_entries_of_own_data(entry):
    with pytest.raises(UsageError, match="DATASETS.OWN"):
        load_config("", ["DATASETS.OWN", [entry]])


def test_uncompressed_run_length_codes_become_what_the_mapper_reads(root):
    import pycocotools.mask as mask_api

    _, json_file = lvis_world(root)
    data = json.loads(json_file.read_text())
    counts = [48 * 2 + 2, 10, 48 * 64 - 48 * 2 - 12]
    data["annotations"][0]["segmentation"] = {"size": [48, 64], "counts": counts}
    json_file.write_text(json.dumps(data))
    code = DatasetCatalog.get("ov_lvis_train_base")[0]["annotations"][0]["segmentation"]
    assert isinstance(code["counts"], str) and mask_api.decode(code).sum() == 10
    data["annotations"][0]["segmentation"] = {"size": [64, 48], "counts": counts}
    json_file.write_text(json.dumps(data))
    with pytest.raises(DataError, match="another size than their image, annotation id 1"):
        DatasetCatalog.get("ov_lvis_train_base")


def test_masks_of_the_other_format_say_which_to_set(root):
    _, json_file = lvis_world(root)
    data = json.loads(json_file.read_text())
    for annotation in data["annotations"]:
        annotation["segmentation"] = {"size": [48, 64], "counts": [100, 10, 48 * 64 - 110]}
    json_file.write_text(json.dumps(data))
    cfg = training_cfg("ov_lvis_train_base", "ov_lvis_val")
    cfg.MODEL.MASK_ON = True
    record = DatasetCatalog.get("ov_lvis_train_base")[0]
    with pytest.raises(DataError, match="set INPUT.MASK_FORMAT to bitmask"):
        build_sample_maker(cfg, True)(record)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    assert build_sample_maker(cfg, True)(record)["instances"].gt_masks.tensor.sum() > 0


def test_masks_are_not_asked_of_data_without():
    cfg = training_cfg("ov_coco_train_base", "ov_coco_val_all")
    cfg.MODEL.MASK_ON = True
    with pytest.raises(UsageError, match="ov_coco_train_base has boxes only"):
        build_sample_maker(cfg, True)
