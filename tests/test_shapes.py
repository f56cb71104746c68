"""OV-Shapes: the generator, its annotations and the embedded teachers."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovdet2.data.datasets import ov_shapes
from ovdet2.data.datasets.ov_shapes import OV_SHAPES
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.errors import DataError, UsageError
from ovdet2.ov_shapes.caption_batches import BatchPlan
from ovdet2.ov_shapes.world import draw
from ovdet2.ov_shapes.world.captions import caption_pair
from ovdet2.ov_shapes.world.classes import (
    BASE_NAMES,
    CLASS_NAMES,
    NOVEL_NAMES,
    SHAPES,
    TEXTURES,
    UNSEEN_COMBINATIONS,
    UNSEEN_NOUNS,
    UNSEEN_SHAPES,
)
from ovdet2.ov_shapes.world.scenes import (
    class_index,
    detection_scene,
    pretraining_scene,
    render_pretraining,
    single_object_scene,
    stream,
)
from ovdet2.vlm.teacher import Teacher

ASSETS = Path(ov_shapes.__file__).resolve().parents[2] / "assets" / "open_clip"
TEACHERS = ("ovshapes-resnet", "ovshapes-vit")
COUNTS = {"train2017": 24, "val2017": 8}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small OV-Shapes on disk: (folder, manifest)."""
    root = tmp_path_factory.mktemp("data")
    return root / "ov_shapes", ov_shapes.ensure_generated(root, counts=COUNTS, workers=1)


def read(folder, name):
    return json.loads((folder / "annotations" / name).read_text())


def test_split_facts():
    assert (len(BASE_NAMES), len(NOVEL_NAMES), len(set(CLASS_NAMES))) == (48, 17, 65)
    assert not set(UNSEEN_NOUNS) & set(UNSEEN_COMBINATIONS)
    assert set(UNSEEN_NOUNS) | set(UNSEEN_COMBINATIONS) == set(NOVEL_NAMES)
    base_words = {word for name in BASE_NAMES for word in name.split()}
    assert not base_words & set(UNSEEN_SHAPES)
    assert base_words == set(TEXTURES) | (set(SHAPES) - set(UNSEEN_SHAPES))
    assert all(set(name.split()) <= base_words for name in UNSEEN_COMBINATIONS)


def test_category_ids_are_those_of_ov_coco():
    assert OV_SHAPES.category_ids == OV_COCO.category_ids
    assert OV_SHAPES.names == CLASS_NAMES
    names = dict((*OV_SHAPES.base, *OV_SHAPES.novel))
    groups = {group: {names[i] for i in ids} for group, ids in OV_SHAPES.groups.items()}
    assert groups == {"unseen_nouns": set(UNSEEN_NOUNS), "unseen_combinations": set(UNSEEN_COMBINATIONS)}


def test_one_seed_gives_one_data_set_whatever_the_order_of_work(small):
    _, manifest = small
    data, pixels, _ = draw.draw_split(0, "val2017", COUNTS["val2017"], ov_shapes.OV_SHAPES.category_ids, workers=2)
    assert pixels == manifest["pixels_sha256"]["val2017"]
    assert draw.annotations_hash(data) == manifest["annotations_sha256"]["val2017"]
    alone = detection_scene(0, "val2017", 5)
    detection_scene(0, "val2017", 2)
    assert np.array_equal(alone.image, detection_scene(0, "val2017", 5).image)
    other, other_pixels, _ = draw.draw_split(1, "val2017", COUNTS["val2017"], ov_shapes.OV_SHAPES.category_ids)
    assert other_pixels != pixels
    assert draw.annotations_hash(other) != draw.annotations_hash(data)


def test_boxes_are_tight_around_visible_pixels_and_inside():
    shapes_of_images = set()
    for index in range(30):
        scene = detection_scene(0, "train2017", index)
        height, width = scene.image.shape[:2]
        shapes_of_images.add((height, width))
        assert 1 <= len(scene.objects) <= 6
        assert scene.masks.sum(axis=0).max() == 1  # a pixel shows one object
        for placed, mask in zip(scene.objects, scene.masks, strict=True):
            x0, y0, x1, y1 = (int(value) for value in placed.box_xyxy)
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            inside = mask[y0:y1, x0:x1]
            assert inside.sum() == mask.sum() == placed.area
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert 0.65 <= placed.visible <= 1.0
    assert shapes_of_images == {(224, 224), (192, 256), (256, 192)}


def test_captions_share_no_seed_with_detection_images():
    captions, images = (
        {int(stream(0, split, i).integers(2**63)) for i in range(500)} for split in ("captions", "train2017")
    )
    assert not captions & images
    image, caption, scene = caption_pair(0, 3)
    again, same_caption, _ = caption_pair(0, 3)
    assert np.array_equal(image, again) and caption == same_caption and image.shape == (128, 128, 3)
    for index in range(200):
        _, caption, scene = caption_pair(0, index, side=32)
        assert all(placed.shape in caption for placed in scene.objects)


def test_captions_name_every_word_of_base_and_novel_classes():
    words = {word for index in range(400) for word in caption_pair(0, index, side=32)[1].rstrip(".").split()}
    assert set(SHAPES) | set(TEXTURES) <= words


def test_training_file_has_no_novel_annotation_though_the_truth_has(small):
    folder, manifest = small
    novel = {category_id for category_id, _ in OV_SHAPES.novel}
    truth, train = read(folder, "instances_train2017.json"), read(folder, "ov_shapes_train_base.json")
    assert novel & {annotation["category_id"] for annotation in truth["annotations"]}
    assert len(truth["annotations"]) == manifest["annotations"]["train2017"]
    assert not novel & {annotation["category_id"] for annotation in train["annotations"]}
    assert not novel & {category["id"] for category in train["categories"]}
    # The honest setting: novel objects do appear in images that are trained on.
    trained = {image["id"] for image in train["images"]}
    assert any(a["image_id"] in trained and a["category_id"] in novel for a in truth["annotations"])


def test_files_on_disk_match_the_annotations(small):
    from PIL import Image

    folder, _ = small
    for split, count in COUNTS.items():
        data = read(folder, f"instances_{split}.json")
        assert len(data["images"]) == count and len(data["categories"]) == 65
        for image in data["images"]:
            with Image.open(folder / split / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"])
    scene = detection_scene(0, "val2017", 0)
    with Image.open(folder / "val2017" / "000000000001.jpg") as opened:
        difference = np.abs(np.asarray(opened, dtype=float) - scene.image)
    assert difference.mean() < 6.0  # JPEG at quality 95
    first = [a for a in read(folder, "instances_val2017.json")["annotations"] if a["image_id"] == 1]
    assert [a["category_id"] for a in first] == [OV_SHAPES.category_ids[class_index(o)] for o in scene.objects]


def test_lvis_form(small):
    folder, _ = small
    truth, lvis = read(folder, "instances_train2017.json"), read(folder, "lvis_v1_train.json")
    by_frequency = {f: {c["id"] for c in lvis["categories"] if c["frequency"] == f} for f in "rcf"}
    assert by_frequency["r"] == {category_id for category_id, _ in OV_SHAPES.novel}
    assert len(by_frequency["c"]) == len(by_frequency["f"]) == 24
    counts = {category["id"]: category["image_count"] for category in lvis["categories"]}
    assert max(counts[i] for i in by_frequency["c"]) <= min(counts[i] for i in by_frequency["f"])
    images_of = {}
    for annotation in truth["annotations"]:
        images_of.setdefault(annotation["category_id"], set()).add(annotation["image_id"])
    assert all(counts[category_id] == len(images) for category_id, images in images_of.items())
    assert sum(category["instance_count"] for category in lvis["categories"]) == len(truth["annotations"])
    for image in lvis["images"]:
        present = {category_id for category_id, images in images_of.items() if image["id"] in images}
        assert image["neg_category_ids"] and not present & set(image["neg_category_ids"])
        assert set(image["not_exhaustive_category_ids"]) <= present
    assert read(folder, "lvis_v1_val.json")["categories"] == lvis["categories"]


def test_lvis_masks_are_the_visible_pixels(small):
    from pycocotools.mask import decode, toBbox

    folder, _ = small
    scene = detection_scene(0, "val2017", 0)
    annotations = [a for a in read(folder, "lvis_v1_val.json")["annotations"] if a["image_id"] == 1]
    for annotation, mask in zip(annotations, scene.masks, strict=True):
        assert np.array_equal(decode(annotation["segmentation"]), mask)
        assert toBbox(annotation["segmentation"]).tolist() == annotation["bbox"] and mask.sum() == annotation["area"]


def test_a_folder_of_before_the_masks_gets_them(small, tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    ov_shapes.ensure_generated(tmp_path, counts={"train2017": 3, "val2017": 2}, workers=1)
    (tmp_path / "ov_shapes" / "annotations" / "ov_lvis_train_base.json").unlink()
    records = DatasetCatalog.get("ov_shapes_lvis_train_base")
    assert [record["file_name"][-26:] for record in records] == [f"train2017/{i:012d}.jpg" for i in (1, 2, 3)]
    assert all(annotation["category_id"] < 48 for record in records for annotation in record["annotations"])
    assert all("counts" in annotation["segmentation"] for record in records for annotation in record["annotations"])


def test_finished_data_is_kept_cut_short_is_redone_and_other_seed_refused(tmp_path):
    counts = {"train2017": 3, "val2017": 2}
    manifest = ov_shapes.ensure_generated(tmp_path, counts=counts, workers=1)
    folder = tmp_path / "ov_shapes"
    image = folder / "train2017" / "000000000001.jpg"
    whole, written = image.read_bytes(), image.stat().st_mtime_ns
    assert ov_shapes.ensure_generated(tmp_path, counts=counts, workers=1) == manifest
    assert image.stat().st_mtime_ns == written
    (folder / "manifest.json").unlink()
    image.write_bytes(whole[:100])
    assert ov_shapes.ensure_generated(tmp_path, counts=counts, workers=1) == manifest
    assert image.read_bytes() == whole
    (folder / "annotations" / "lvis_v1_val.json").unlink()
    ov_shapes.ensure_generated(tmp_path, counts=counts, workers=1)
    assert (folder / "annotations" / "lvis_v1_val.json").is_file()
    with pytest.raises(DataError, match="delete that folder"):
        ov_shapes.ensure_generated(tmp_path, seed=1, counts=counts)
    with pytest.raises(UsageError, match="seed >= 0"):
        ov_shapes.ensure_generated(tmp_path, seed=-1)


def _generate_here(root, written):
    ov_shapes.ensure_generated(root, counts={"train2017": 3, "val2017": 2}, workers=1)
    written.put((Path(root) / "ov_shapes" / "manifest.json").stat().st_mtime_ns)


def test_one_of_two_processes_generates(tmp_path):
    context = multiprocessing.get_context("fork")
    written = context.Queue()
    processes = [context.Process(target=_generate_here, args=(tmp_path, written)) for _ in range(2)]
    for process in processes:
        process.start()
    times = {written.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(times) == 1


def test_registered_and_generated_on_first_use(tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(ov_shapes, "IMAGE_COUNTS", {"train2017": 3, "val2017": 2})
    train = DatasetCatalog.get("ov_shapes_train_base")
    assert 1 <= len(train) <= 3
    assert all(annotation["category_id"] < 48 for record in train for annotation in record["annotations"])
    assert len(DatasetCatalog.get("ov_shapes_val_all")) == 2
    assert MetadataCatalog.get("ov_shapes_val_all").thing_classes == list(CLASS_NAMES)


def test_teachers_fit_the_size_and_state_their_making():
    assert sum((ASSETS / f"{name}.safetensors").stat().st_size for name in TEACHERS) <= 24e6
    for name in TEACHERS:
        manifest = json.loads((ASSETS / f"{name}.manifest.json").read_text())
        assert manifest["schema"] == "ovdet2/embedded-teacher/1"
        assert manifest["weights_sha256"] == Teacher.load(name, "embedded").fingerprint.weights_sha256


def test_pretrained_trunk_states_its_making():
    folder = ASSETS.parent / "backbones"
    manifest = json.loads((folder / "ovshapes_r18.manifest.json").read_text())
    assert manifest["schema"] == "ovdet2/embedded-backbone/1"
    assert manifest["weights_sha256"] == hashlib.sha256((folder / "ovshapes_r18.safetensors").read_bytes()).hexdigest()
    assert manifest["held_out_accuracy_percent"]["both"] >= 75


def test_pretraining_shows_base_classes_alone_and_no_image_of_another_set():
    seen = [pretraining_scene(7, index) for index in range(96)]
    assert all(CLASS_NAMES[class_index(placed)] in BASE_NAMES for scene in seen for placed in scene.objects)
    names = [f"{scene.objects[0].texture} {scene.objects[0].shape}" for scene in seen]
    assert names == [BASE_NAMES[index % 48] for index in range(96)]
    images = render_pretraining(7, 3, workers=1)
    assert np.array_equal(images, np.stack([scene.image for scene in seen[:3]]))
    assert not np.array_equal(images[0], single_object_scene(7, 0).image)


@pytest.mark.parametrize(("name", "whole_floor", "crop_floor"), [(TEACHERS[0], 0.85, 0.6), (TEACHERS[1], 0.2, 0.12)])
def test_embedded_teacher_tells_the_classes_apart(name, whole_floor, crop_floor):
    import open_clip

    from ovdet2.vlm.crops import crop_regions
    from ovdet2.vocabulary.templates import render

    teacher = Teacher.load(name, "embedded")
    assert open_clip.get_tokenizer(name)(["a photo of a moon"]).shape == (1, 32)
    texts = teacher.encode_text([render(label, "single")[0] for label in CLASS_NAMES])

    def tensor(image):
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255.0

    size = teacher.image_size
    wholes = [tensor(single_object_scene(7, index).image)[None] for index in range(65)]
    pixels = torch.cat([F.interpolate(i, size=(size, size), mode="bilinear", antialias=True) for i in wholes])
    right = (teacher.encode_image(pixels) @ texts.T).argmax(dim=1) == torch.arange(65)
    assert right.float().mean() >= whole_floor
    hits = []
    for index in range(40):
        scene = detection_scene(7, "val2017", index)
        image = torch.from_numpy(scene.image).permute(2, 0, 1)
        crops = crop_regions(image, torch.tensor([placed.box_xyxy for placed in scene.objects]), size)
        found = (teacher.encode_image(crops) @ texts.T).argmax(dim=1).tolist()
        hits += [class_index(placed) == guess for placed, guess in zip(scene.objects, found, strict=True)]
    assert sum(hits) / len(hits) >= crop_floor


def test_a_batch_never_holds_a_caption_twice():
    captions = [f"text {index % 37}" for index in range(200)]
    plan = BatchPlan(captions, 20, seed=0)
    batches = [plan.batch(step) for step in range(20)]
    for batch in batches:
        assert len({captions[index] for index in batch}) == len(batch)
    assert batches[3] == BatchPlan(captions, 20, seed=0).batch(3)
    assert batches[0] != batches[10]  # another epoch, another order


def test_a_world_of_another_version_is_refused(tmp_path):
    manifest = ov_shapes.ensure_generated(tmp_path, counts={"train2017": 2, "val2017": 1}, workers=1)
    ov_shapes.ensure_current(tmp_path)  # another size is fine
    path = tmp_path / "ov_shapes" / "manifest.json"
    path.write_text(json.dumps(manifest | {"schema": "ovdet2/ov-shapes/1"}))
    with pytest.raises(
        DataError, match="of ovdet2/ov-shapes/1, this version draws ovdet2/ov-shapes/2: delete that folder"
    ):
        ov_shapes.ensure_current(tmp_path)


def test_seed_zero_draws_the_pixels_of_this_version():
    """A change of these hashes is a change of the benchmark: raise SCHEMA and measure every row again."""
    digest = hashlib.sha256(b"".join(detection_scene(0, "val2017", i).image.tobytes() for i in range(4))).hexdigest()
    assert digest.startswith("472bc66654583bda")
