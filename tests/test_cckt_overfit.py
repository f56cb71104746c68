"""A small CCKT-Det learns one image of OV-Shapes by heart, and names its objects by similarity alone."""

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
from ovdet2.methods.cckt.sample import ObjectCrops, PresentWords
from ovdet2.modeling import OpenVocabularyDeformableDETR
from tests.test_detr_overfit import SMALL, STEPS


@pytest.mark.slow
def test_one_image(tmp_path, monkeypatch):
    """The teacher is a perfect one: it sees of each object its word. No loss but the contrast brings words to the
    embeddings; of all 65, the right one is found for each object, in a box with IoU above 0.9."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    ensure_generated(tmp_path, counts={"train2017": 8, "val2017": 2}, workers=1)
    records = DatasetCatalog.get("ov_shapes_train_base")
    mapper = build_sample_maker(load_config("ovshapes/detr_text_r18.yaml", SMALL), True)
    record = mapper(max(records, key=lambda record: len({box["category_id"] for box in record["annotations"]})))
    published = ["MODEL.CCKT.CLASS_LOSS_ON", "class", "MODEL.CCKT.SIMILARITY_BIAS", "0.0"]
    cfg, truth = load_config("ovshapes/cckt_full_r18.yaml", [*SMALL, *published]), record["instances"]
    assert len(truth) > 2
    torch.manual_seed(0)
    model = OpenVocabularyDeformableDETR(cfg)
    AtomicCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    crops = model.vocabulary.embeddings[truth.gt_classes].half()
    record.attach(ObjectCrops(crops, torch.ones(len(truth), dtype=torch.bool)))
    record.attach(PresentWords(truth.gt_classes.unique()))
    optimizer = build_optimizer(cfg, model)
    contrast = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = model([record])
        contrast.append(losses["loss_contrast"].item())
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)
        optimizer.step()
    assert sum(contrast[-24:]) < 0.5 * sum(contrast[:24]), contrast
    size = dict(zip(("height", "width"), truth.image_size))
    with torch.no_grad():
        found = model.eval()([replace(record, **size)])[0]["instances"][: 2 * len(truth)]
    overlaps = pairwise_iou(truth.gt_boxes, found.pred_boxes)
    same = truth.gt_classes[:, None] == found.pred_classes
    assert (overlaps * same).amax(dim=1).min() > 0.9, (overlaps, truth.gt_classes, found.pred_classes, found.scores)
    assert set(found.prior_words.tolist()) <= set(truth.gt_classes.tolist())
