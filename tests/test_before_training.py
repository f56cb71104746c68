"""Faults of the test sets and of the names of classes end a run before its first step."""

import json
import uuid
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2 import cli
from ovdet2.config import find_config, get_cfg, load_config
from ovdet2.data.datasets import register_ov_dataset
from ovdet2.data.datasets.own import register_own
from ovdet2.data.datasets.register import split_by_names
from ovdet2.data.datasets.register_readers import register_image_labels
from ovdet2.engine import Trainer
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_json
from tests.micro_training import micro_cfg

CASES = Path(__file__).parent / "cases"
IMAGES = CASES / "images"
FAULTS = CASES / "28-test-fault-found-after-training"
BASE, NOVEL = ["plum", "lime"], ["fig"]


@pytest.fixture
def register():
    names = []

    def register(json_file, base=BASE, novel=(), images=IMAGES, **options):
        names.append(f"before_{uuid.uuid4().hex}")
        register_ov_dataset(names[-1], json_file, images, base, novel, **options)
        return names[-1]

    yield register
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def trainer_of(folder, train, test, steps=2):
    options = ["DATASETS.TRAIN", str((train,)), "DATASETS.TEST", str(tuple(test)), "SOLVER.MAX_ITER", str(steps)]
    return Trainer(micro_cfg(folder / "out", [*options, "DATALOADER.ASPECT_RATIO_GROUPING", "False"]))


@pytest.mark.parametrize(
    "name, message",
    [
        ("test", "annotation"),
        ("test_missing", r"1[0-2]? of 12 images of the test set .* do not exist: .*before training"),
        ("absent", "absent.json does not exist"),
    ],
)
def test_faults_of_the_test_set_come_before_the_first_step(name, message, register, tmp_path):
    train = register(FAULTS / "train.json", base_only=True)
    with pytest.raises(DataError, match=message):
        trainer_of(tmp_path, train, [register(FAULTS / f"{name}.json", novel=NOVEL)])


def test_the_second_test_set_is_looked_at_too(register, tmp_path):
    train, good = register(FAULTS / "train.json", base_only=True), register(FAULTS / "train.json", novel=NOVEL)
    other = register(FAULTS / "train.json", images=tmp_path, novel=NOVEL)
    with pytest.raises(DataError, match=f"12 of 12 images of the test set {other} do not exist"):
        trainer_of(tmp_path, train, [good, other])


def test_backslashes_in_missing_names_get_a_hint(register, tmp_path):
    data = read_json(FAULTS / "train.json")
    for image in data["images"]:
        image["file_name"] = f"images\\{image['file_name']}"
    (tmp_path / "test.json").write_text(json.dumps(data))
    train = register(FAULTS / "train.json", base_only=True)
    with pytest.raises(DataError, match="write slashes"):
        trainer_of(tmp_path, train, [register(tmp_path / "test.json", novel=NOVEL)])


def test_a_test_set_without_a_metric_is_refused(register, tmp_path):
    train = register(FAULTS / "train.json", base_only=True)
    foreign = register(FAULTS / "train.json", novel=NOVEL)
    MetadataCatalog.get(foreign).__dict__["evaluator_type"] = "coco"
    with pytest.raises(UsageError, match=f"{foreign} has evaluator type 'coco'"):
        trainer_of(tmp_path, train, [foreign])


def test_names_count_not_category_ids(register, tmp_path):
    """The same names have other category ids in the test json, in another order."""
    data = read_json(FAULTS / "train.json")
    new_ids = {1: 30, 2: 2**40, 3: 1}
    for category in data["categories"]:
        category["id"] = new_ids[category["id"]]
    for box in data["annotations"]:
        box["category_id"] = new_ids[box["category_id"]]
    data["categories"].reverse()
    (tmp_path / "test.json").write_text(json.dumps(data))
    train = register(FAULTS / "train.json", base_only=True)
    trainer = trainer_of(tmp_path, train, [register(tmp_path / "test.json", novel=NOVEL)])
    trainer.train()
    assert "AP50-base" in trainer._last_eval_results["bbox"]
    records = [DatasetCatalog.get(name)[0]["annotations"] for name in (train, *trainer.cfg.DATASETS.TEST)]
    assert [box["category_id"] for box in records[0]] == [box["category_id"] for box in records[1]]
    with pytest.raises(UsageError, match="the same names in another order"):
        trainer_of(tmp_path, train, [register(FAULTS / "train.json", base=BASE[::-1], novel=NOVEL)])
    with pytest.raises(UsageError, match=r"different base classes \(only in one of them: 'fig'\)"):
        trainer_of(tmp_path, train, [register(FAULTS / "train.json", base=[*BASE, *NOVEL])])


@pytest.mark.parametrize("name", ["float", "missing", "text"])
def test_a_json_without_valid_sizes_trains_and_is_evaluated(name, register, tmp_path):
    path = CASES / "13-image-size-fields" / f"{name}.json"
    train = register(path, base=[*BASE, *NOVEL], base_only=True)
    trainer = trainer_of(tmp_path, train, [register(path, base=[*BASE, *NOVEL])])
    trainer.train()
    assert trainer._last_eval_results["bbox"]["AP50-all"] >= 0


ODD_NAMES = {
    "text": ("plum", r"base .*is 'plum': give a list of class names, such as \['plum'\]"),
    "a dict": ("{0: plum}", "give a list of class names"),
    "nothing": ("", "is None: give a list"),
    "octal": ("[02146, 21008]", r"holds 1126, 21008, .*quote it"),
    "integers": ("[0, 1, 2]", "holds 0, 1, 2, .*quote it"),
    "booleans": ("[yes, no, off]", "holds True, False, False, .*quote it"),
    "a fraction": ("[plum, 1.5]", "holds 1.5, .*quote it"),
    "a date": ("[2024-01-01]", r"holds datetime\.date\(2024, 1, 1\), .*quote it"),
    "null": ("[plum, ~]", "holds None, .*quote it"),
    "a list in a list": ("[[plum, lime]]", "quote it"),
}


@pytest.mark.parametrize("kind", ["boxes", "image_labels"])
@pytest.mark.parametrize("key", ["base", "novel"])
@pytest.mark.parametrize("case", ODD_NAMES)
def test_names_that_are_no_list_of_text_are_refused_at_the_entry(case, key, kind, tmp_path):
    text, message = ODD_NAMES[case]
    names = {"base": "[plum]", "novel": "[fig]", key: text}
    source = f"json: {FAULTS / 'train.json'}, " if kind == "boxes" else ""
    path = tmp_path / "own.yaml"
    path.write_text(
        f"_BASE_: {find_config('base/ovshapes_r18.yaml')}\nDATASETS:\n  OWN:\n"
        f"    - {{kind: {kind}, name: own_odd, {source}images: {IMAGES}, base: {names['base']}, novel: {names['novel']}}}\n"
    )
    with pytest.raises(UsageError, match="entry 0 of DATASETS.OWN, 'own_odd'"):
        load_config(str(path))
    with pytest.raises(UsageError, match=message.replace("base", key)):
        load_config(str(path))
    assert "own_odd" not in DatasetCatalog.list()


OWN_ENTRIES = {
    "boxes": {"name": "own_odd", "json": "a.json", "images": "images", "base": ["plum"]},
    "captions": {"name": "own_odd", "captions": "a.json", "images": "images"},
    "image_labels": {"name": "own_odd", "images": "images", "base": ["plum"]},
}
ODD_PATHS = ([], ["a.json"], {}, {"path": "a"}, 7, 1.5, True, "", "  ", "a\0b")
ODD_FLAGS = ("yes", "True", 1, 0, None, [], {})
ODD_VALUES = [
    *[(kind, "name", odd) for kind in OWN_ENTRIES for odd in (*ODD_PATHS, None)],
    *[(kind, "images", odd) for kind in OWN_ENTRIES for odd in ODD_PATHS],
    *[("boxes", "json", odd) for odd in (*ODD_PATHS, None)],
    *[("captions", "captions", odd) for odd in (*ODD_PATHS, None)],
    *[("captions", "index_file", odd) for odd in ODD_PATHS],
    *[("image_labels", "labels", odd) for odd in ODD_PATHS],
    *[("boxes", key, odd) for key in ("base_only", "masks", "pseudo_labels") for odd in ODD_FLAGS],
    *[("image_labels", "novel_labels", odd) for odd in ODD_FLAGS],
    *[("boxes", "metric", odd) for odd in ("coco", "", None, 1, ["ov_coco"], {})],
    *[("captions", "format", odd) for odd in ("json", "", None, 1, ["tar"], {})],
    *[(kind, "max_bad", odd) for kind in ("captions", "image_labels") for odd in ("3", -1, 1.0, True, None, [])],
    *[(kind, "kind", odd) for kind in OWN_ENTRIES for odd in ("", None, 1, ["boxes"], {}, True)],
]


@pytest.mark.parametrize("kind, key, odd", ODD_VALUES)
def test_values_of_a_wrong_type_name_the_entry_and_the_key(kind, key, odd):
    cfg = get_cfg()
    cfg.DATASETS.OWN = [{"kind": kind, **OWN_ENTRIES[kind], key: odd}]
    with pytest.raises(UsageError) as error:
        register_own(cfg)
    text = str(error.value)
    assert "entry 0 of DATASETS.OWN" in text and key in text and repr(odd) in text and text.endswith(".")
    assert error.value.exit_code == 2 and "own_odd" not in DatasetCatalog.list()


def test_the_program_ends_with_2_and_one_sentence(tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text("DATASETS:\n  OWN:\n    - {name: own_odd, json: [a.json], images: images, base: [plum]}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--config-file", str(path)])
    output = capsys.readouterr()
    assert ended.value.code == 2 and "json of entry 0 of DATASETS.OWN, 'own_odd' is ['a.json']" in output.err
    assert "Traceback" not in output.err + output.out


@pytest.mark.parametrize("value", ["{name: a}", "own.json", "7", "{}"])
def test_own_that_is_no_list(value, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"DATASETS:\n  OWN: {value}\n")
    with pytest.raises(UsageError, match="DATASETS.OWN"):
        load_config(str(path))


def test_python_callers_get_the_same_answer():
    for function in (register_ov_dataset, register_image_labels):
        for names in ("plum", {"plum": 1}, [1126]):
            with pytest.raises(UsageError, match="give a list|quote it|lists of names"):
                function("own_odd", "a.json", "images", names)
            with pytest.raises(UsageError, match="give a list|quote it|lists of names"):
                function("own_odd", "a.json", "images", ["plum"], novel_names=names)
    assert "own_odd" not in DatasetCatalog.list()


@pytest.mark.parametrize("name", ["train", "train_case"])
def test_a_heading_of_the_same_name_is_no_class(name, register):
    path = CASES / "05-root-category-of-the-same-name" / f"{name}.json"
    records = DatasetCatalog.get(register(path, base=["fruit"]))
    assert sum(len(record["annotations"]) for record in records) == 36
    data = read_json(path)
    data["categories"].append({**data["categories"][1], "id": 7})
    with pytest.raises(UsageError, match=r"several categories named 'fruit' \(ids 1, 7\): rename"):
        split_by_names("x", ["fruit"], [], data["categories"], path)
