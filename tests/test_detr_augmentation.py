"""DETR's two ways of resizing: sizes, shares, and that boxes and cached regions follow the pixels."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

from ovdet2.caches.region_cache import Regions
from ovdet2.config import get_cfg
from ovdet2.data.detr_augmentation import detr_crop
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.data.steps.regions import CachedRegions, transform_regions
from ovdet2.errors import UsageError

HEIGHT, WIDTH = 120, 200


def settings(*overrides):
    """Small sizes: short side 60 to 100 in the end, 80 or 90 before a crop of 40 to 70 pixels a side."""
    cfg = get_cfg()
    cfg.INPUT.DETR_CROP.ENABLED = True
    cfg.INPUT.DETR_CROP.RESIZE, cfg.INPUT.DETR_CROP.SIDES = (80, 90), (40, 70)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.FORMAT = (60, 80, 100), 150, "RGB"
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.fixture
def record(tmp_path):
    """An image with a red rectangle under a box of class 0, and a blue one in a corner under a box of class 1."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[30:90, 60:140, 0] = 255
    pixels[100:120, 180:200, 2] = 255
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    boxes = [([60, 30, 80, 60], 0, 0), ([180, 100, 20, 20], 1, 0), ([0, 0, 50, 50], 1, 1)]
    annotations = [
        {"bbox": box, "bbox_mode": 1, "category_id": label, "iscrowd": crowd, "area": 1.0}
        for box, label, crowd in boxes
    ]
    return {
        "file_name": str(path), "image_id": 1, "height": HEIGHT, "width": WIDTH, "annotations": annotations
    }  # fmt: skip


def mapped_by_seed(cfg, record, seeds=range(40), is_train=True):
    mapper, found = build_sample_maker(cfg, is_train), []
    for seed in seeds:
        np.random.seed(seed)
        found.append(mapper(record))
    return found


def is_cropped(mapped):
    """A resize alone keeps the sides' ratio to a pixel."""
    height, width = mapped["image"].shape[1:]
    return abs(width / height - WIDTH / HEIGHT) > 0.02


def test_half_of_the_images_are_cropped_and_all_are_resized(record):
    found = mapped_by_seed(settings(), record, range(200))
    assert 0.4 < np.mean([is_cropped(mapped) for mapped in found]) < 0.6
    for mapped in found:
        short, long = sorted(mapped["image"].shape[1:])
        assert long <= 150 and (short in (60, 80, 100) or long == 150)
    shorts = {min(mapped["image"].shape[1:]) for mapped in found if not is_cropped(mapped)}
    assert shorts >= {60, 80, 90}  # 100 would make the other side 167 pixels long: cut to 150, and 90


def test_boxes_follow_the_pixels(record):
    """The red rectangle is where box 0 says, whatever was drawn; crowds are no target; a lost box is no target."""
    lost, flipped = 0, 0
    for mapped in mapped_by_seed(settings(), record, range(60)):
        instances = mapped["instances"]
        height, width = mapped["image"].shape[1:]
        boxes = instances.gt_boxes.tensor
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height, width, height])).all()
        assert set(instances.gt_classes.tolist()) <= {0, 1} and len(instances) <= 2
        lost += len(instances) < 2
        for box, label in zip(boxes, instances.gt_classes.tolist()):
            channel = 0 if label == 0 else 2
            rows, columns = torch.nonzero(mapped["image"][channel] > 127, as_tuple=True)
            if len(rows):
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert torch.allclose(box, torch.tensor(found).float(), atol=2.0)
        whole = not is_cropped(mapped)
        flipped += whole and boxes[instances.gt_classes == 1][0, 0] < width / 2
    assert lost > 5 and flipped > 5


def test_cached_regions_go_through_the_same_transforms():
    """A region on a box ends where the box does, or is left out with it."""
    augmentation = T.AugmentationList([detr_crop((80, 90), (40, 110), 1.0), T.ResizeShortestEdge(60, 150)])
    boxes = np.array([[60.0, 30, 140, 90], [180, 100, 200, 120]])
    kept = []
    for seed in range(20):
        np.random.seed(seed)
        transforms = augmentation(image := T.AugInput(np.zeros((HEIGHT, WIDTH, 3), np.uint8)))
        cached = Regions(torch.from_numpy(boxes).float(), torch.eye(2, 4).half(), torch.tensor([-1, -1]), torch.ones(2))
        found = CachedRegions(*transform_regions(cached, transforms, image.image.shape[:2], 10))
        expected = transforms.apply_box(boxes).clip(0, np.array(image.image.shape[1::-1] * 2))
        inside = (expected[:, 2:] > expected[:, :2]).all(axis=1)
        assert np.allclose(found.boxes_xyxy, expected[inside], atol=1e-3)
        assert torch.equal(found.embeddings, cached.embeddings[torch.from_numpy(inside)])
        kept.append(len(found.boxes_xyxy))
    assert min(kept) < 2 and max(kept) == 2


def test_everything_may_be_cropped_away(record):
    record["annotations"] = record["annotations"][1:]
    counts = [len(mapped["instances"]) for mapped in mapped_by_seed(settings(), record)]
    assert 0 in counts and 1 in counts


def test_evaluation_is_not_cropped(record):
    cfg = settings("INPUT.MIN_SIZE_TEST", "60", "INPUT.MAX_SIZE_TEST", "150")
    assert {tuple(mapped["image"].shape) for mapped in mapped_by_seed(cfg, record, is_train=False)} == {(3, 60, 100)}


def test_switched_off_changes_nothing(record):
    found = mapped_by_seed(settings("INPUT.DETR_CROP.ENABLED", "False"), record)
    assert not any(is_cropped(mapped) for mapped in found)


def test_crop_is_limited_by_a_small_image():
    """A picture below the crop's size stays whole."""
    image = T.AugInput(np.zeros((30, 30, 3), np.uint8))
    detr_crop((30,), (384, 600), 1.0)(image)
    assert image.image.shape == (30, 30, 3)


@pytest.mark.parametrize("overrides", [
    ["INPUT.DETR_CROP.RESIZE", "()"], ["INPUT.DETR_CROP.SIDES", "(70, 40)"], ["INPUT.DETR_CROP.SIDES", "(40,)"],
])  # fmt: skip
def test_sizes_that_make_no_sense(overrides):
    with pytest.raises(UsageError, match="INPUT.DETR_CROP"):
        build_sample_maker(settings(*overrides), True)
