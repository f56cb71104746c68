"""Detections of Detic's Deformable DETR equal those of an independent statement, on JPEG bytes of 480 x 640."""

import pytest
import torch
from torch.nn import functional as F

from ovdet2.config import load_config
from ovdet2.methods.detic.tests.detic_cases import sample_of, words
from ovdet2.modeling import OpenVocabularyDeformableDETR
from ovdet2.modeling.detr.import_weights import has_row_per_class, import_weights
from tests.oracles import deformable_detr_cases as cases
from tests.oracles.detic_cases import SIZE, picture
from tests.oracles.formula import uniform

IMAGE = torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])


def published():
    """The detector of the published configuration with the weights of the case, imported."""
    cfg = load_config("lvis/deformable_detr_r50_two_stage.yaml", ["MODEL.DEVICE", "cpu"])
    rows = F.normalize(2 * uniform("rows", (cases.CLASSES, 8)).float() - 1, dim=1)  # a closed head reads none of them
    detector = OpenVocabularyDeformableDETR(cfg, vocabulary=words(rows)).eval()
    imported, variant = import_weights(cases.weights(), range(cases.CLASSES))
    assert variant == "two_stage" and has_row_per_class(cases.weights())
    detector.network.load_state_dict(imported)
    return detector


def require_equal(detections):
    """Boxes to 1e-3 pixels, scores to 1e-5, the same classes, and as many as stored."""
    expected = cases.golden()
    assert len(detections) == len(expected["boxes"]) == 300
    assert torch.equal(detections.pred_classes, expected["classes"])
    # Here boxes are clipped to the image; published ones may end beyond it.
    clipped = expected["boxes"].clamp(min=0).minimum(IMAGE)
    assert torch.allclose(detections.pred_boxes.tensor, clipped, atol=1e-3, rtol=0)
    assert torch.allclose(detections.scores, expected["scores"], atol=1e-5, rtol=0)


@torch.no_grad()
def detect(detector, short_side=cases.SHORT_SIDE):
    """Detections of the picture."""
    return detector([sample_of(picture(), short_side)])[0]["instances"]


def test_detections_equal_the_oracle():
    detections = detect(published())
    require_equal(detections)
    assert len(detections.pred_classes.unique()) > 5 and len(detections.queries.unique()) > 200


@pytest.mark.slow
def test_the_stored_outputs_are_those_of_the_oracle():
    now, stored = cases.oracle(), cases.golden()
    assert torch.equal(now["classes"], stored["classes"])
    assert torch.allclose(now["boxes"], stored["boxes"], atol=1e-3, rtol=0)
    assert torch.allclose(now["scores"], stored["scores"], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["colours", "padding", "size", "shift", "queries"])
def test_the_comparison_sees_faults(fault, monkeypatch):
    """Of the input: another colour order, padding, another size. Of the network: half a pixel, and a query less."""
    detector = published()
    if fault == "colours":
        detector.pixel_mean, detector.pixel_std = detector.pixel_mean.flip(0), detector.pixel_std.flip(0)
    elif fault == "padding":
        monkeypatch.setattr(type(detector.network.backbone), "size_divisibility", 32)
    elif fault == "shift":
        attention = detector.network.transformer.encoder.layers[3].self_attn
        plain = attention.sample
        monkeypatch.setattr(
            attention, "sample", lambda *given: (lambda points, shares: (points + 0.5 / 54, shares))(*plain(*given))
        )
    elif fault == "queries":
        detector.network.transformer.query_maker.num_queries -= 1
    with pytest.raises(AssertionError):
        require_equal(detect(detector, cases.SHORT_SIDE + 16 * (fault == "size")))
