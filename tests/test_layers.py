"""Score fusion, closed-set classifier, class-wise NMS: independent references and properties."""

import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.errors import UsageError
from ovdet2.layers import ClosedSetClassifier, class_wise_nms, fuse_scores, fusion_exponents
from ovdet2.vocabulary.bank import WordBank
from tests import micro


def test_closed_set_head_refuses_other_words():
    buffer = WordBank(micro.vocabulary())
    layer = ClosedSetClassifier(12, buffer)
    assert layer.num_training_classes == 5 and layer(torch.zeros(2, 12)).shape == (2, 6)
    buffer.set(micro.vocabulary(("cat",), 0))
    with pytest.raises(UsageError, match="closed-set head of 5"):
        layer(torch.zeros(2, 12))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 10_000))
def test_fusion_equals_reference(r, k, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(r, k + 1, generator=generator).softmax(1)
    second = torch.rand(r, k, generator=generator).softmax(1)
    fused = fuse_scores(first, second, torch.full((k,), exponent))
    expected = first.double().clone()
    for i in range(r):
        for j in range(k):
            expected[i, j] = float(first[i, j]) ** (1 - exponent) * float(second[i, j]) ** exponent
    assert torch.allclose(fused.double(), expected, atol=1e-6)
    renormalised = fuse_scores(first, second, exponent, renormalize=True)
    assert torch.allclose(renormalised.sum(1), torch.ones(r), atol=1e-5)


def test_fusion_ends_and_zero_probability():
    first = torch.tensor([[0.0, 0.7, 0.3]])
    second = torch.tensor([[0.5, 0.0]])
    assert torch.equal(fuse_scores(first, second, 0.0), first)
    assert torch.equal(fuse_scores(first, second, 1.0)[:, :2], second)
    assert torch.equal(fuse_scores(first, second, 1 / 3)[:, :2], torch.zeros(1, 2))
    assert fusion_exponents(torch.tensor([True, False]), 1 / 3, 2 / 3).tolist() == pytest.approx([1 / 3, 2 / 3])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 15), st.integers(0, 10_000))
def test_class_wise_nms_equals_detectron2_over_all_pairs(r, k, topk, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(r, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(r, 2, generator=generator) * 30], 1)
    scores = torch.rand(r, k + 1, generator=generator)
    expected, _ = fast_rcnn_inference_single_image(boxes, scores, (100, 100), 0.1, 0.5, topk)
    regions, classes = class_wise_nms(boxes, scores[:, :-1], 0.1, 0.5, topk)
    assert torch.equal(scores[regions, classes], expected.scores)
    assert torch.equal(classes, expected.pred_classes)
    assert torch.equal(boxes[regions], expected.pred_boxes.tensor)


def test_class_wise_nms_grows_until_enough_survive():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(500, 1)  # one survivor per class
    scores = torch.linspace(0.5, 1, 500)[:, None] * torch.tensor([[1.0, 1e-3, 1e-4]])
    regions, classes = class_wise_nms(boxes, scores, 0.0, 0.5, 3)
    assert regions.tolist() == [499, 499, 499] and classes.tolist() == [0, 1, 2]
