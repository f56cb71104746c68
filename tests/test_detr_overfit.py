"""A small Deformable DETR with a text branch learns one image of OV-Shapes by heart."""

from dataclasses import replace

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import pairwise_iou

from ovdet2.config import load_config
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.engine import AtomicCheckpointer
from ovdet2.engine.optimizer import build_optimizer
from ovdet2.modeling import OpenVocabularyDeformableDETR

STEPS = 120
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.DETR.DIM", "64", "MODEL.DETR.FFN_DIM", "128", "MODEL.DETR.ENCODER_LAYERS", "1",
    "MODEL.DETR.DECODER_LAYERS", "2", "MODEL.DETR.NUM_QUERIES", "20", "MODEL.VOCABULARY.TEMPLATES", "single",
    "SOLVER.BASE_LR", "0.001", "INPUT.RANDOM_FLIP", "none",
]  # fmt: skip


@pytest.mark.slow
def test_one_image(tmp_path, monkeypatch):
    """Every object has a detection of its word, of all 65, with IoU above 0.9, and these are the best of the image."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    ensure_generated(tmp_path, counts={"train2017": 8, "val2017": 2}, workers=1)
    cfg = load_config("ovshapes/detr_text_r18.yaml", SMALL)
    records = DatasetCatalog.get("ov_shapes_train_base")
    record = build_sample_maker(cfg, True)(max(records, key=lambda record: len(record["annotations"])))
    truth = record["instances"]
    assert len(truth) > 2
    torch.manual_seed(0)
    model = OpenVocabularyDeformableDETR(cfg)
    AtomicCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    optimizer = build_optimizer(cfg, model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(model([record]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)
        optimizer.step()
    size = dict(zip(("height", "width"), truth.image_size))
    with torch.no_grad():
        found = model.eval()([replace(record, **size)])[0]["instances"][: len(truth)]
    overlaps = pairwise_iou(truth.gt_boxes, found.pred_boxes)
    same = truth.gt_classes[:, None] == found.pred_classes
    assert (overlaps * same).amax(dim=1).min() > 0.9, (overlaps, truth.gt_classes, found.pred_classes, found.scores)
