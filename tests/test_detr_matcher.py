"""Boxes, targets and matching against references in plain float64 Python, and their properties."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.errors import NumericalError
from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.targets import Targets
from tests import detr_cases


def corners(box):
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def giou_reference(a, b):
    """Two boxes (left, top, right, bottom) with area."""
    (ax, ay, aX, aY), (bx, by, bX, bY) = a, b
    both = max(0, min(aX, bX) - max(ax, bx)) * max(0, min(aY, bY) - max(ay, by))
    union = (aX - ax) * (aY - ay) + (bX - bx) * (bY - by) - both
    hull = (max(aX, bX) - min(ax, bx)) * (max(aY, bY) - min(ay, by))
    return both / union - (hull - union) / hull


def cost_reference(logits, box, label, target_box):
    """Cost of one pair: lists of float."""
    p = 1 / (1 + math.exp(-logits[label]))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    l1 = sum(abs(a - b) for a, b in zip(box, target_box))
    return 2 * focal + 5 * l1 - 2 * giou_reference(corners(box), corners(target_box))


def pairs_of(matches):
    return sorted(zip(matches.image.tolist(), matches.query.tolist(), matches.target.tolist()))


class TestBoxes:
    def test_conversion_and_back(self):
        boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6], [0.1, 0.9, 0.0, 0.2]], dtype=torch.float64)
        assert torch.allclose(cxcywh_to_xyxy(boxes)[0], torch.tensor([0.4, 0.1, 0.6, 0.7], dtype=torch.float64))
        assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)

    def test_pairs_and_rows_equal_the_reference(self):
        a, b = (cxcywh_to_xyxy(detr_cases.outputs(1, 1, 7, seed=seed).pred_boxes[0, 0]).double() for seed in (1, 2))
        expected = torch.tensor([[giou_reference(x.tolist(), y.tolist()) for y in b] for x in a], dtype=torch.float64)
        assert torch.allclose(generalized_iou(a[:, None], b[None]), expected, atol=1e-12)
        assert torch.allclose(generalized_iou(a, b), expected.diagonal(), atol=1e-12)
        assert torch.allclose(generalized_iou(a[:, None].float(), b[None].float()), expected.float(), atol=1e-5)

    def test_small_boxes_are_not_biased(self):
        """Two pixels of 1333: where an epsilon beside the area would show."""
        a = torch.tensor([0.5, 0.5, 0.5015, 0.5015])
        b = torch.tensor([0.5005, 0.5, 0.502, 0.5015])
        reference = giou_reference(a.double().tolist(), b.double().tolist())
        assert abs(generalized_iou(a, b).item() - reference) < 1e-4

    @pytest.mark.parametrize("other, expected", [
        ([0.5, 0.5, 0.5, 0.5], 0.0),
        ([0.5, 0.2, 0.5, 0.9], 0.0),
        ([0.7, 0.7, 0.7, 0.7], -1.0),
        ([0.4, 0.4, 0.6, 0.6], 0.0),
    ])  # fmt: skip
    def test_box_without_area(self, other, expected):
        point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
        found = generalized_iou(point, torch.tensor(other))
        found.backward()
        assert found.item() == pytest.approx(expected, abs=1e-6) and torch.isfinite(point.grad).all()


class TestTargets:
    def test_boxes_are_shares_of_their_own_image(self):
        made = detr_cases.samples((1,), height=50, width=200)
        made[0]["instances"].gt_boxes.tensor[:] = torch.tensor([20.0, 10.0, 60.0, 40.0])
        targets = Targets.of_samples(made, "cpu")
        assert torch.allclose(targets.boxes_cxcywh, torch.tensor([[0.2, 0.5, 0.2, 0.6]]))
        assert targets.names == ("0.jpg (id 10)",) and targets.label_limit == int(targets.labels[0]) + 1

    def test_no_object_at_all(self):
        targets = detr_cases.targets((0, 0))
        assert len(targets) == 0 and targets.label_limit == 0 and targets.counts == (0, 0)
        assert targets.boxes_cxcywh.shape == (0, 4) and targets.labels.dtype == torch.int64

    def test_padded_rows(self):
        targets = detr_cases.targets((2, 0, 1))
        padded = targets.padded(targets.boxes_cxcywh)
        assert padded.shape == (3, 2, 4) and torch.equal(padded[2, 0], targets.boxes_cxcywh[2])
        assert padded[1].abs().sum() == 0 and padded[2, 1].abs().sum() == 0


class TestCost:
    @pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 0.2)])
    def test_equals_the_reference(self, dtype, atol):
        """The targets are float32. A half-precision input is rounded before, not within."""
        outputs, targets = detr_cases.outputs(2, 3, 6, dtype=dtype), detr_cases.targets((2, 0, 3))
        cost = HungarianMatcher().cost(outputs, targets)
        assert cost.shape == (2, 3, 6, 3) and cost.dtype == (torch.float32 if dtype is torch.bfloat16 else dtype)
        start = 0
        for image, count in enumerate(targets.counts):
            for layer, query, column in itertools.product(range(2), range(6), range(count)):
                exact = detr_cases.outputs(2, 3, 6, dtype=torch.float64)
                expected = cost_reference(
                    exact.pred_logits[layer, image, query].tolist(),
                    exact.pred_boxes[layer, image, query].tolist(),
                    targets.labels[start + column].item(),
                    targets.boxes_cxcywh[start + column].tolist(),
                )
                assert cost[layer, image, query, column].item() == pytest.approx(expected, abs=atol)
            start += count

    def test_saturated_logits_stay_finite(self):
        outputs, targets = detr_cases.outputs(1, 1, 4), detr_cases.targets((2,))
        outputs = replace(outputs, pred_logits=outputs.pred_logits.sign() * 200)
        assert torch.isfinite(HungarianMatcher().cost(outputs, targets)).all()

    def test_a_method_adds_its_own(self):
        outputs, targets = detr_cases.outputs(2, 1, 4), detr_cases.targets((3,))
        similarity = torch.rand(2, 1, 4, 5)
        outputs = outputs.with_added(similarity=similarity)

        def extra(outputs, labels):
            return -outputs.added["similarity"].gather(-1, labels[:, None].expand(2, 1, 4, -1))

        difference = HungarianMatcher(extra_costs=[(3.0, extra)]).cost(outputs, targets) - HungarianMatcher().cost(
            outputs, targets
        )
        assert torch.allclose(difference, -3 * similarity[..., targets.labels], atol=1e-5)


class TestMatching:
    @settings(max_examples=25, deadline=None)
    @given(
        counts=st.lists(st.integers(0, 4), min_size=1, max_size=3), queries=st.integers(1, 5), words=st.integers(1, 5)
    )
    def test_is_the_cheapest_assignment(self, counts, queries, words):
        """Over all assignments, by brute force; with fewer queries than objects every query is used."""
        outputs = detr_cases.outputs(2, len(counts), queries, words, dtype=torch.float64)
        targets = detr_cases.targets(counts, words)
        matcher = HungarianMatcher()
        layers, start = matcher(outputs, targets), 0
        assert len(layers) == 2
        for image, count in enumerate(counts):
            for layer, matches in enumerate(layers):
                mine = [(q, t - start) for i, q, t in pairs_of(matches) if i == image]
                assert len(mine) == min(count, queries) == len({q for q, _ in mine}) == len({t for _, t in mine})
                assert all(0 <= t < count for _, t in mine)
                if mine:
                    table = matcher.cost(outputs, targets)[layer, image, :, :count].numpy()
                    short, long = (count, queries) if count <= queries else (queries, count)
                    table = table.T if count <= queries else table
                    best = min(
                        sum(table[row, column] for row, column in enumerate(chosen))
                        for chosen in itertools.permutations(range(long), short)
                    )
                    found = sum(table[t, q] if count <= queries else table[q, t] for q, t in mine)
                    assert found == pytest.approx(best, abs=1e-9)
            start += count

    def test_batch_equals_singles(self):
        outputs, made = detr_cases.outputs(2, 3, 6), detr_cases.samples((2, 0, 4))
        batch = HungarianMatcher()(outputs, Targets.of_samples(made, "cpu"))
        start = 0
        for image, record in enumerate(made):
            single = HungarianMatcher()(detr_cases.only(outputs, image), Targets.of_samples([record], "cpu"))
            for layer in range(2):
                expected = [(image, q, t + start) for _, q, t in pairs_of(single[layer])]
                assert [pair for pair in pairs_of(batch[layer]) if pair[0] == image] == expected
            start += len(record["instances"])

    def test_order_of_queries_does_not_matter(self):
        outputs, targets = detr_cases.outputs(1, 2, 6), detr_cases.targets((3, 2))
        order = torch.tensor([3, 5, 0, 1, 4, 2])
        [plain] = HungarianMatcher()(outputs, targets)
        [shuffled] = HungarianMatcher()(detr_cases.changed(outputs, lambda value: value[:, :, order]), targets)
        assert sorted((i, order[q].item(), t) for i, q, t in pairs_of(shuffled)) == pairs_of(plain)

    def test_no_object_at_all(self):
        layers = HungarianMatcher()(detr_cases.outputs(3, 2, 4), detr_cases.targets((0, 0)))
        assert [len(matches) for matches in layers] == [0, 0, 0] and layers[0].query.dtype == torch.int64

    def test_queries_that_may_not_be_matched(self):
        """Neither are they, nor does it matter what they hold."""
        outputs, targets = detr_cases.outputs(1, 2, 6), detr_cases.targets((3, 2))
        valid = torch.tensor([[True, False, True, True, False, True], [False, True, False, False, False, False]])
        spoilt = detr_cases.changed(outputs, torch.clone)
        spoilt.pred_boxes[0, ~valid] = float("nan")
        [matches], [again] = HungarianMatcher()(outputs, targets, valid), HungarianMatcher()(spoilt, targets, valid)
        assert pairs_of(matches) == pairs_of(again) and len(matches) == 3 + 1
        assert valid[matches.image, matches.query].all()

    @pytest.mark.parametrize("key, value", [("pred_logits", "nan"), ("pred_boxes", "nan"), ("pred_boxes", "inf")])
    def test_cost_that_is_not_finite_names_the_image(self, key, value):
        outputs, targets = detr_cases.outputs(2, 2, 4), detr_cases.targets((1, 2))
        getattr(outputs, key)[1, 1, 2] = float(value)
        with pytest.raises(NumericalError, match=r"1\.jpg \(id 11\).*layer 1") as caught:
            HungarianMatcher()(outputs, targets)
        assert isinstance(caught.value, FloatingPointError)  # what the training step stops at

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu(self):
        outputs, made = detr_cases.outputs(2, 2, 6), detr_cases.samples((3, 2))
        expected = HungarianMatcher()(outputs, Targets.of_samples(made, "cpu"))
        on_gpu = detr_cases.changed(outputs, lambda value: value.cuda())
        found = HungarianMatcher()(on_gpu, Targets.of_samples(made, "cuda"))
        assert found[0].query.is_cuda and [pairs_of(m) for m in found] == [pairs_of(m) for m in expected]
