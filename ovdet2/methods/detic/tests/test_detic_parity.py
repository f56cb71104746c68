"""Detections equal those of an independent statement of the published network, on JPEG bytes of 480 x 640."""

import pytest
import torch

from ovdet2.methods.detic.tests.detic_cases import detect, published
from tests.oracles import detic, detic_cases


def require_equal(detections, expected):
    """Boxes to 1e-3 pixels, scores to 1e-5, the same classes, and masks but for 1e-5 of the pixels."""
    assert len(detections) == len(expected["boxes"]) > 0
    assert torch.equal(detections.pred_classes, expected["classes"])
    assert torch.allclose(detections.pred_boxes.tensor, expected["boxes"], atol=1e-3, rtol=0)
    assert torch.allclose(detections.scores, expected["scores"], atol=1e-5, rtol=0)
    assert detections.has("pred_masks") == ("masks" in expected)
    if "masks" in expected:
        assert (detections.pred_masks != expected["masks"]).double().mean() < 1e-5


@pytest.mark.parametrize("trunk", [*detic.TRUNKS, detic_cases.C4])
def test_detections_equal_the_oracle(trunk):
    detections = detect(published(trunk), detic_cases.picture(), detic_cases.SHORT_SIDE[trunk])
    require_equal(detections, detic_cases.golden(trunk))
    assert len(detections.pred_classes.unique()) > 1
    assert trunk == detic_cases.C4 or (
        detections.pred_masks.flatten(1).any(dim=1).all() and detections.has("pred_masks")
    )


@pytest.mark.slow
@pytest.mark.parametrize("trunk", [*detic.TRUNKS, detic_cases.C4])
def test_the_stored_outputs_are_those_of_the_oracle(trunk):
    now, stored = detic_cases.oracle(trunk), detic_cases.golden(trunk)
    assert torch.equal(now["classes"], stored["classes"])
    assert torch.allclose(now["boxes"], stored["boxes"], atol=1e-3, rtol=0)
    assert torch.allclose(now["scores"], stored["scores"], atol=1e-5, rtol=0)
    assert trunk == detic_cases.C4 or (now["masks"] != stored["masks"]).double().mean() < 1e-5


@pytest.mark.parametrize("fault", ["colours", "padding", "size"])
def test_the_comparison_sees_faults_of_the_input(fault):
    """Another colour order, another padding, and another size of the input change the detections."""
    detector = published("resnet18")
    if fault == "colours":
        detector.pixel_mean, detector.pixel_std = detector.pixel_mean.flip(0), detector.pixel_std.flip(0)
    elif fault == "padding":
        detector.backbone._size_divisibility = 128
    detections = detect(detector, detic_cases.picture(), 320 + 16 * (fault == "size"))
    with pytest.raises(AssertionError):
        require_equal(detections, detic_cases.golden("resnet18"))
