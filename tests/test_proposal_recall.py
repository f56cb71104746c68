"""Recall of proposals: the greedy pairing, limits, base and novel apart."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.evaluation.proposal_recall import average_recall, covered_iou
from tests.evaluation_sets import SPLIT, feed, proposals, random_set, xyxy


def brute_force_covered(gt, boxes):
    """The greedy pairing written a second way: all pairs sorted once by IoU, taken while both ends are free."""
    pairs = []
    for j, g in enumerate(gt):
        for i, p in enumerate(boxes):
            w = max(0.0, min(g[2], p[2]) - max(g[0], p[0]))
            h = max(0.0, min(g[3], p[3]) - max(g[1], p[1]))
            union = (g[2] - g[0]) * (g[3] - g[1]) + (p[2] - p[0]) * (p[3] - p[1]) - w * h
            pairs.append((w * h / union if union else 0.0, i, j))
    covered, used = [0.0] * len(gt), (set(), set())
    for iou, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if i not in used[0] and j not in used[1]:
            covered[j] = iou
            used[0].add(i)
            used[1].add(j)
    return covered


@pytest.mark.parametrize("seed", range(5))
def test_covered_iou_equals_brute_force(seed):
    random = np.random.default_rng(seed)
    gt, boxes = (xyxy(random.uniform(1, 60, (count, 4))) for count in (6, 40))
    np.testing.assert_allclose(covered_iou(gt, boxes), brute_force_covered(gt, boxes), atol=1e-12)
    np.testing.assert_allclose(covered_iou(gt, boxes[:3]), brute_force_covered(gt, boxes[:3]), atol=1e-12)


box = st.tuples(*[st.integers(0, 40)] * 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(box, max_size=5), st.lists(box, max_size=8))
def test_covered_iou_is_bounded_and_grows_with_proposals(gt, boxes):
    gt, boxes = xyxy(gt), xyxy(boxes)
    full = covered_iou(gt, boxes)
    assert full.shape == (len(gt),)
    assert ((full >= 0) & (full <= 1)).all()
    assert (full > 0).sum() <= len(boxes)
    assert full.max(initial=0) >= covered_iou(gt, boxes[: len(boxes) // 2]).max(initial=0)


def test_average_recall_by_hand():
    assert average_recall([1.0, 0.0]) == 50
    assert average_recall([0.5, 0.74, 0.95]) == pytest.approx(100 * (1 + 5 + 10) / 30)
    assert math.isnan(average_recall([]))


def test_proposal_recall_is_split_by_subset_and_limited_by_score(make_evaluator):
    data, _ = random_set(7)
    by_image = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    random = np.random.default_rng(0)
    given_boxes = {}
    for image_id in by_image:
        boxes, logits = xyxy(np.round(random.uniform(1, 90, (250, 4)))), random.normal(size=250)
        given_boxes[image_id] = (boxes, torch.tensor(logits))
    evaluator = make_evaluator(data)
    feed(evaluator, data, [], proposals_of=lambda image_id: proposals(*given_boxes[image_id]))
    results = evaluator.evaluate()["proposals"]
    thresholds = np.arange(10) * 0.05 + 0.5
    for subset, ids in (("novel", (5, 90)), ("base", (7, 3, 50)), ("all", SPLIT.category_ids)):
        for limit in (100, 300):
            covered = []
            for image_id, annotations in by_image.items():
                gt = xyxy([a["bbox"] for a in annotations if a["category_id"] in ids and not a["iscrowd"]])
                boxes, logits = given_boxes[image_id]
                covered += brute_force_covered(gt, boxes[np.argsort(-logits.numpy())[:limit]])
            expected = 100 * np.mean([[iou >= t - 1e-12 for t in thresholds] for iou in covered])
            assert results[f"AR@{limit}-{subset}"] == pytest.approx(expected, abs=1e-9)
    assert results["AR@300-all"] > results["AR@100-all"]


def test_a_box_of_an_image_without_proposals_counts_as_missed(make_evaluator):
    data, _ = random_set(7)
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 0
    truth = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        truth[annotation["image_id"]].append(annotation["bbox"])
    empty = max(truth, key=lambda image_id: len(truth[image_id]))
    evaluator = make_evaluator(data)
    feed(evaluator, data, [], proposals_of=lambda i: proposals([] if i == empty else xyxy(truth[i])))
    expected = 100 * (1 - len(truth[empty]) / len(data["annotations"]))
    assert evaluator.evaluate()["proposals"]["AR@100-all"] == pytest.approx(expected)
