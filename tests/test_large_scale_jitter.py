"""Large scale jitter: sizes, and that boxes follow the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet2.config import get_cfg
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.errors import UsageError

HEIGHT, WIDTH, SIDE = 60, 120, 100


def settings(*overrides):
    cfg = get_cfg()
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIDE, cfg.INPUT.FORMAT = True, SIDE, "RGB"
    cfg.INPUT.LSJ.SCALES = (0.5, 2.0)
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.fixture
def record(tmp_path):
    """An image with a red rectangle under a box of class 0, and a blue one in a corner under a box of class 1."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[15:45, 30:70, 0] = 255
    pixels[45:60, 105:120, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    annotations = [
        {"bbox": box, "bbox_mode": 1, "category_id": label, "iscrowd": 0, "area": 1.0}
        for label, box in enumerate(([30, 15, 40, 30], [105, 45, 15, 15]))
    ]
    return {
        "file_name": str(tmp_path / "image.png"), "image_id": 1, "height": HEIGHT, "width": WIDTH,
        "annotations": annotations,
    }  # fmt: skip


def mapped_by_seed(cfg, record, seeds, is_train=True):
    mapper = build_sample_maker(cfg, is_train)
    for seed in seeds:
        np.random.seed(seed)
        yield mapper(record)


def test_sizes_range_over_the_scales_and_boxes_follow_the_pixels(record):
    widths, lost, flipped = [], 0, 0
    for mapped in mapped_by_seed(settings(), record, range(80)):
        height, width = mapped["image"].shape[1:]
        assert height <= SIDE and width <= SIDE
        widths.append(width)
        instances = mapped["instances"]
        assert instances.image_size == (height, width)
        lost += len(instances) < 2
        for box, label in zip(instances.gt_boxes.tensor, instances.gt_classes.tolist()):
            rows, columns = torch.nonzero(mapped["image"][0 if label == 0 else 2] > 127, as_tuple=True)
            if len(rows):
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert torch.allclose(box, torch.tensor(found).float(), atol=2.5)
        corner = instances.gt_boxes.tensor[instances.gt_classes == 1]
        flipped += len(corner) > 0 and corner[0, 0] < width / 2
    assert min(widths) < 65 and max(widths) == SIDE and 0.5 < np.mean(np.array(widths) == SIDE) < 0.85
    assert lost > 5 and flipped > 5


def test_training_alone_and_only_when_asked_for(record):
    sizes = ["INPUT.MIN_SIZE_TEST", "30", "INPUT.MAX_SIZE_TEST", "80", "INPUT.MIN_SIZE_TRAIN", "(30,)"]
    for cfg, is_train in ((settings(*sizes), False), (settings(*sizes, "INPUT.LSJ.ENABLED", "False"), True)):
        assert {tuple(m["image"].shape) for m in mapped_by_seed(cfg, record, range(5), is_train)} == {(3, 30, 60)}


@pytest.mark.parametrize("overrides", [
    ["INPUT.LSJ.SCALES", "(2.0, 0.5)"], ["INPUT.LSJ.SCALES", "(1.0,)"], ["INPUT.LSJ.SIDE", "0"],
    ["INPUT.DETR_CROP.ENABLED", "True"],
])  # fmt: skip
def test_settings_that_make_no_sense(overrides):
    with pytest.raises(UsageError, match="INPUT.LSJ"):
        build_sample_maker(settings(*overrides), True)
