"""Noised boxes of dynamic queries: each rule against a statement in float64, and how much of the object it keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.config import load_config
from ovdet2.errors import UsageError
from ovdet2.methods.clip_detr.box_noise import SHIFTS, moved_boxes
from ovdet2.methods.clip_detr.dynamic_queries import DynamicQueries
from ovdet2.modeling.detr.heads import inverse_sigmoid
from tests import detr_cases


def literal(box, u, rho):
    """Eq. 7 as the paper writes it, one number after the other."""
    x, y, w, h = box
    return x + rho * u[0] * w / 2, y + rho * u[1] * h / 2, w + rho * u[2] * w, h + rho * u[3] * h


def signed(box, u, rho):
    return literal(box, [2 * share - 1 for share in u], rho)


def corners(box, u, rho):
    """DINO: the noise of a corner is a random sign times a random part of half a side; the image is the limit."""
    x, y, w, h = box
    left, top, right, bottom = (
        min(max(edge + rho * (2 * share - 1) * side / 2, 0.0), 1.0)
        for edge, share, side in zip((x - w / 2, y - h / 2, x + w / 2, y + h / 2), u, (w, h, w, h))
    )
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


RULES = {"literal": literal, "signed": signed, "corners": corners}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("rho", [0.0, 0.4, 1.0, 1.5])
def test_boxes_equal_the_reference(shift, rho):
    generator = torch.Generator().manual_seed(1)
    boxes = detr_cases.targets((5,)).boxes_cxcywh.double()
    edges = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.995, 0.004, 0.01, 0.008]], dtype=torch.float64)
    boxes = torch.cat([boxes, edges])
    shares = torch.rand(7, 2, 4, generator=generator, dtype=torch.float64)
    found = moved_boxes(boxes, shares, rho, shift)
    for i, s in np.ndindex(7, 2):
        wanted = RULES[shift](boxes[i].tolist(), shares[i, s].tolist(), rho)
        wanted = np.clip(wanted, [0.01, 0.01, 0.001, 0.001], 0.99)
        np.testing.assert_allclose(found[i, s].numpy(), wanted, atol=1e-12)
    if rho == 0:
        torch.testing.assert_close(found[:5], boxes[:5, None].expand(-1, 2, -1))
    elif shift == "literal":
        assert (found[:5, :, 2:] >= boxes[:5, None, 2:]).all() and (found[:5, :, :2] >= boxes[:5, None, :2]).all()


def test_a_box_of_the_whole_image_can_still_be_moved():
    [[place]] = moved_boxes(torch.tensor([[0.5, 0.5, 1.0, 1.0]]), torch.full((1, 1, 4), 0.5), rho=1.0, shift="signed")
    correction = torch.zeros(4, requires_grad=True)
    (inverse_sigmoid(place) + correction).sigmoid().sum().backward()
    assert correction.grad.min() > 0.005


def mean_iou(shift, rho, boxes, shares):
    """Mean IoU of noised boxes with their objects, stated in numpy."""
    found = moved_boxes(torch.from_numpy(boxes), torch.from_numpy(shares)[:, None], rho, shift)[:, 0].numpy()
    low = np.maximum(boxes[:, :2] - boxes[:, 2:] / 2, found[:, :2] - found[:, 2:] / 2)
    high = np.minimum(boxes[:, :2] + boxes[:, 2:] / 2, found[:, :2] + found[:, 2:] / 2)
    inner = (high - low).clip(min=0).prod(axis=1)
    return (inner / (boxes[:, 2:].prod(axis=1) + found[:, 2:].prod(axis=1) - inner)).mean()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_rules_on_random_boxes(seed):
    """Corners keep more of the object than the literal rule, and this more than the signed one and than rho 1.5."""
    random = np.random.default_rng(seed)
    sides = random.uniform(0.05, 0.4, (4000, 2))
    boxes = np.concatenate([random.uniform(sides / 2, 1 - sides / 2), sides], axis=1)
    shares = random.uniform(size=(4000, 4))
    literal, signed, corners = (mean_iou(shift, 1.0, boxes, shares) for shift in ("literal", "signed", "corners"))
    assert corners > literal > signed + 0.07
    assert literal > mean_iou("literal", 1.5, boxes, shares) + 0.08
    assert literal < mean_iou("literal", 0.4, boxes, shares) < mean_iou("literal", 0.1, boxes, shares)


@pytest.mark.parametrize("shift, wanted", [("literal", 0.361), ("signed", 0.264), ("corners", 0.385)])
def test_the_mean_iou_far_from_the_border(shift, wanted):
    random = np.random.default_rng(0)
    boxes = np.concatenate([np.full((60_000, 2), 0.5), random.uniform(0.05, 0.3, (60_000, 2))], axis=1)
    assert mean_iou(shift, 1.0, boxes, random.uniform(size=(60_000, 4))) == pytest.approx(wanted, abs=0.004)


def test_the_rule_of_the_paper_is_the_default():
    assert load_config("coco/clip_detr_r50_12ep.yaml").MODEL.CLIP_DETR.SHIFT == "literal"
    assert load_config("ovshapes/clip_detr_both_closed_r18.yaml").MODEL.CLIP_DETR.SHIFT == "literal"
    assert DynamicQueries().shift == "literal"
    with pytest.raises(UsageError, match="left"):
        DynamicQueries(shift="left")
