"""The splits of OV-Shapes: no image in two of them, the test images as they were published, and drawn when first used."""

import json
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.data.datasets import ov_shapes
from ovdet2.data.datasets.ov_shapes import HASHES, OV_SHAPES, TEST_ANNOTATION_FILES, ensure_generated, ensure_test
from ovdet2.data.datasets.register import validation_set_of
from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.files import read_json
from ovdet2.ov_shapes import __main__ as program
from ovdet2.ov_shapes.world.captions import CAPTION_COUNT
from ovdet2.ov_shapes.world.classes import CLASS_NAMES
from ovdet2.ov_shapes.world.draw import annotations_hash, draw_image, draw_split
from ovdet2.ov_shapes.world.scenes import IMAGE_COUNTS, TEST_COUNT, class_weights, stream

COUNTS = {"train2017": 4, "val2017": 2}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Root of a small OV-Shapes of before the test split."""
    root = tmp_path_factory.mktemp("data")
    ensure_generated(root, counts=COUNTS, workers=1)
    return root


@pytest.fixture
def root(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_twenty_test_images_are_drawn_as_published():
    """A change of these hashes is a change of the benchmark: every figure on test must be measured again."""
    published = read_json(HASHES)["test_images"]
    assert len(published) == 20
    for file_name, hashes in published.items():
        index = int(file_name.removesuffix(".jpg")) - 1
        image, objects, _, digest = draw_image(0, "test2017", OV_SHAPES.category_ids, None, index)
        assert image["file_name"] == file_name
        assert digest.hex() == hashes["pixels_sha256"], f"{file_name}: other pixels"
        content = annotations_hash({"image": image, "annotations": objects})
        assert content == hashes["annotations_sha256"], f"{file_name}: other annotations"


@pytest.mark.slow
@pytest.mark.parametrize("split", ["val2017", "test2017"])
def test_all_images_of_a_split_are_drawn_as_published(split):
    published = read_json(HASHES)
    data, pixels, _ = draw_split(0, split, published["images"][split], OV_SHAPES.category_ids)
    assert pixels == published["pixels_sha256"][split]
    assert annotations_hash(data) == published["annotations_sha256"][split]


def test_no_two_images_share_a_seed():
    counts = IMAGE_COUNTS | {"test2017": TEST_COUNT, "captions": CAPTION_COUNT, "single": 650}
    states = [
        stream(0, split, index).bit_generator.state["state"]["state"]
        for split, count in counts.items()
        for index in range(count)
    ]
    assert len(set(states)) == len(states) == sum(counts.values())


def test_all_classes_are_as_frequent_in_test():
    assert np.allclose(class_weights("test2017"), 1 / 65)
    assert not np.allclose(class_weights("train2017"), 1 / 65)


def test_test_images_are_added_and_nothing_else_changes(root):
    folder = root / "ov_shapes"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    manifest = ensure_test(root, count=3, workers=1)
    assert manifest["images"] == {"test2017": 3} and manifest["seed"] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    added = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}
    added -= {path.relative_to(folder).as_posix() for path in before}
    images = {f"test2017/{number:012d}.jpg" for number in (1, 2, 3)}
    assert added == images | {f"annotations/{name}" for name in TEST_ANNOTATION_FILES} | {"manifest_test.json"}
    (folder / ".lock").unlink()
    (folder / ".lock").mkdir()  # as if read-only: a complete split needs no lock
    assert ensure_test(root) == manifest


def test_data_sets_of_the_test_split(root):
    ensure_test(root, count=3, workers=1)
    records = DatasetCatalog.get("ov_shapes_test")
    assert [record["file_name"][-25:] for record in records] == [f"test2017/{i:012d}.jpg" for i in (1, 2, 3)]
    assert MetadataCatalog.get("ov_shapes_test").thing_classes == list(CLASS_NAMES)
    lvis = DatasetCatalog.get("ov_shapes_lvis_test")
    assert [record["file_name"] for record in lvis] == [record["file_name"] for record in records]
    assert sum(len(record["annotations"]) for record in lvis) == sum(len(r["annotations"]) for r in records) > 0
    annotations = root / "ov_shapes" / "annotations"
    assert read_json(annotations / "lvis_v1_test.json")["categories"] == read_json(annotations / "lvis_v1_val.json")["categories"]  # fmt: skip
    held_out = {name for name in DatasetCatalog.list() if validation_set_of(name)}
    assert {name for name in held_out if name.startswith("ov_")} == {"ov_shapes_test", "ov_shapes_lvis_test"}
    assert validation_set_of("ov_shapes_test") == "ov_shapes_val_all" and validation_set_of("no such") == ""


def test_other_data_sets_draw_no_test_image(root, monkeypatch):
    monkeypatch.setattr(ov_shapes, "_draw_test", None)
    for name in ("ov_shapes_train_base", "ov_shapes_val_all", "ov_shapes_lvis_val", "ov_shapes_lvis_train_base"):
        assert DatasetCatalog.get(name)
    assert not (root / "ov_shapes" / "test2017").exists()


def test_first_use_draws_the_split_with_the_seed_of_the_data_set(root, monkeypatch):
    monkeypatch.setattr(ov_shapes, "TEST_COUNT", 2)
    path = root / "ov_shapes" / "manifest.json"
    path.write_text(json.dumps(read_json(path) | {"seed": 5}))
    assert len(DatasetCatalog.get("ov_shapes_test")) == 2
    manifest = read_json(root / "ov_shapes" / "manifest_test.json")
    _, pixels, _ = draw_split(5, "test2017", 2, OV_SHAPES.category_ids)
    assert manifest["seed"] == 5 and manifest["pixels_sha256"] == {"test2017": pixels}


def test_an_interrupted_split_is_drawn_again(root):
    manifest = ensure_test(root, count=2, workers=1)
    folder = root / "ov_shapes"
    (folder / "manifest_test.json").unlink()
    (folder / "test2017" / "000000000001.jpg").write_bytes(b"cut")
    assert ensure_test(root, count=2, workers=1) == manifest
    assert (folder / "test2017" / "000000000001.jpg").stat().st_size > 1000
    (folder / "annotations" / "lvis_v1_test.json").unlink()
    ensure_test(root, count=2, workers=1)
    assert (folder / "annotations" / "lvis_v1_test.json").is_file()


def test_a_split_of_something_else_is_refused(root):
    manifest = ensure_test(root, count=2, workers=1)
    path = root / "ov_shapes" / "manifest_test.json"
    with pytest.raises(DataError, match="manifest_test.json is of the test split .*delete that file, and run"):
        ensure_test(root, count=3)
    for change in ({"seed": 1}, {"schema": "ovdet2/ov-shapes/1"}):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(DataError, match="manifest_test.json is of the test split"):
            ensure_test(root)
    with pytest.raises(UsageError, match="at least one image, not 0"):
        ensure_test(root, count=0)


def test_a_folder_that_cannot_be_written(root):
    lock = root / "ov_shapes" / ".lock"
    lock.unlink()
    lock.mkdir()
    assert DatasetCatalog.get("ov_shapes_val_all")
    with pytest.raises(SetupError, match="cannot be written .*--test where it can be"):
        ensure_test(root, count=2)


def test_images_that_are_not_the_benchmarks_are_reported(root, monkeypatch, caplog, tmp_path):
    path = tmp_path / "hashes.json"
    published = read_json(HASHES)
    path.write_text(json.dumps(published | {"images": published["images"] | {"test2017": 2}}))
    monkeypatch.setattr(ov_shapes, "HASHES", path)
    ensure_test(root, count=2, workers=1)
    assert "test2017 of OV-Shapes differs from the benchmark's, as numpy" in caplog.text


def test_by_the_command(root, monkeypatch, capsys):
    monkeypatch.setattr(ov_shapes, "IMAGE_COUNTS", COUNTS)
    monkeypatch.setattr(ov_shapes, "TEST_COUNT", 2)
    program.main(["--root", str(root)])
    assert not (root / "ov_shapes" / "manifest_test.json").exists()
    program.main(["--root", str(root), "--test", "--workers", "1"])
    assert '"test2017": 2' in capsys.readouterr().out and (root / "ov_shapes" / "manifest_test.json").is_file()
