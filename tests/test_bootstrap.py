"""The bootstrap over images: parity with AP today, with an explicit resampling, and paired differences."""

import copy
import math

import numpy as np
import pytest

from ovdet2.evaluation.bootstrap import (
    bootstrap,
    image_weights,
    interval,
    match_classes,
    paired_intervals,
    resampled_ap,
)
from ovdet2.evaluation.coco_ap import evaluate_classes
from ovdet2.evaluation.columns import Truth
from ovdet2.evaluation.federation import Federation
from tests.evaluation_sets import SPLIT, columns_of, pycocotools_per_class, random_set, with_masks
from tests.test_lvis_evaluation import random_lvis

SUBSETS = {"novel": (5, 90, 1), "base": (7, 3, 50), "all": SPLIT.category_ids}


def distinct_scores(detections):
    """The same with another score for each: copies of an image order equal scores otherwise than weights do."""
    scores = np.random.default_rng(1).permutation(len(detections)) + 1
    return [{**found, "score": int(score) / 10000} for found, score in zip(detections, scores)]


def resampled(data, detections, weights):
    """The json and the detections in which each image is as often as its weight."""
    drawn = {"categories": data["categories"], "images": [], "annotations": []}
    found = []
    order = sorted(data["images"], key=lambda image: image["id"])
    for image, weight in zip(order, weights.tolist()):
        for _ in range(weight):
            new = len(drawn["images"]) + 1
            drawn["images"].append({**image, "id": new})
            for annotation in data["annotations"]:
                if annotation["image_id"] == image["id"]:
                    drawn["annotations"].append({**annotation, "id": len(drawn["annotations"]) + 1, "image_id": new})
            found += [{**each, "image_id": new} for each in detections if each["image_id"] == image["id"]]
    return drawn, found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("crowds", [True, False])
def test_weights_of_one_give_the_ap_of_the_evaluation(seed, task, crowds):
    """With ties, crowds, images without boxes."""
    truth, found = columns_of(*with_masks(*random_set(seed)))
    if not crowds:
        truth = Truth(**{**vars(truth), "difficult": truth.crowd})
    ids = SPLIT.category_ids
    expected = evaluate_classes(truth, found, ids, task, (100,), crowds=crowds)
    ones = np.ones((1, len(truth.images)), np.uint16)
    seen = 0
    for category_id, matches in match_classes(truth, found, ids, task, crowds=crowds):
        [values] = resampled_ap(matches, ones)
        for name, value in (("AP50", values[0]), ("AP75", values[5]), ("AP", values.mean())):
            assert abs(value - expected[category_id][name]) < 1e-12 * 100, (category_id, name)
        seen += values.mean() > 0
    assert seen >= 4


@pytest.mark.parametrize("seed", [0, 4])
def test_weights_of_one_give_the_ap_of_the_federated_evaluation(seed):
    truth, found = columns_of(*random_lvis(seed))
    federation = Federation(truth.images)
    expected = evaluate_classes(truth, found, SPLIT.category_ids, "bbox", (300,), federation)
    ones = np.ones((1, len(truth.images)), np.uint16)
    matched = dict(match_classes(truth, found, SPLIT.category_ids, "bbox", federation))
    assert matched.keys() == {i for i, figures in expected.items() if not math.isnan(figures["AP"])}
    assert any(matches.ignored.any() for matches in matched.values())
    for category_id, matches in matched.items():
        assert abs(resampled_ap(matches, ones).mean() - expected[category_id]["AP"]) < 1e-10


def test_resamples_equal_pycocotools_on_images_that_are_repeated():
    data, detections = random_set(3)
    detections = distinct_scores(detections)
    truth, found = columns_of(data, detections)
    weights = image_weights(len(truth.images), 4, seed=7)
    assert (weights.sum(axis=1) == len(truth.images)).all() and weights.max() > 1
    got = {i: resampled_ap(matches, weights) for i, matches in match_classes(truth, found, SPLIT.category_ids)}
    for row, of_images in enumerate(weights):
        expected = pycocotools_per_class(*resampled(data, detections, of_images), SPLIT.category_ids)
        for category_id, values in got.items():
            for name, value in (("AP50", values[row, 0]), ("AP75", values[row, 5]), ("AP", values[row].mean())):
                assert value == pytest.approx(expected[category_id][name], abs=1e-9, nan_ok=True)


def test_resamples_equal_the_federated_evaluation_of_repeated_images():
    data, detections = random_lvis(5)
    detections = distinct_scores(detections)
    truth, found = columns_of(data, detections)
    weights = image_weights(len(truth.images), 3, seed=2)
    federation = Federation(truth.images)
    made = bootstrap(truth, found, SPLIT, ("AP",), SUBSETS, federation, resamples=3, seed=2)
    for row, of_images in enumerate(weights):
        again = columns_of(*resampled(data, detections, of_images))
        figures = evaluate_classes(*again, SPLIT.category_ids, "bbox", (300,), Federation(again[0].images))
        for subset, ids in SUBSETS.items():
            known = [figures[i]["AP"] for i in ids if not math.isnan(figures[i]["AP"])]
            assert abs(made["values"][f"AP-{subset}"][row] - sum(known) / len(known)) < 1e-9


def test_a_class_that_no_resample_has_and_one_without_detections():
    truth, found = columns_of(*random_set(2))
    weights = np.zeros((2, len(truth.images)), np.uint16)
    weights[1] = 1
    none, all_of = np.array([resampled_ap(m, weights)[:, 0] for _, m in match_classes(truth, found, (7, 3))]).T
    assert np.isnan(none).all() and (all_of > 0).all()
    empty = type(found)(*(getattr(found, name)[:0] for name in ("image_ids", "category_ids", "scores", "boxes_xyxy")))
    [(_, matches)] = match_classes(truth, empty, (7,))
    assert resampled_ap(matches, weights[1:]).tolist() == [[0.0] * 10]


def test_intervals_contain_the_figure_and_narrow_with_more_images():
    widths = []
    for images in (20, 200):
        truth, found = columns_of(*random_set(6, images=images))
        made = bootstrap(truth, found, SPLIT, ("AP50", "AP"), SUBSETS)
        figure = np.mean([evaluate_classes(truth, found, SUBSETS["base"])[i]["AP50"] for i in SUBSETS["base"]])
        low, high = made["intervals"]["AP50-base"]
        assert low < figure < high and len(made["values"]["AP50-base"]) == made["resamples"] == 200
        assert made["figures"]["AP50-base"] == pytest.approx(figure, abs=1e-10)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    assert interval(1.0, [None]) is interval(None, [1.0]) is None
    assert interval(5.0, [1.0, None, 3.0]) == pytest.approx([4.05, 5.95])


def test_a_paired_difference_uses_the_same_images():
    truth, found = columns_of(*random_set(6, images=40))
    a = bootstrap(truth, found, SPLIT, ("AP50",), SUBSETS)
    assert all(ends == [0.0, 0.0] for ends in paired_intervals(a, copy.deepcopy(a)).values())
    fewer = type(found)(*(getattr(found, name)[::2] for name in ("image_ids", "category_ids", "scores", "boxes_xyxy")))
    b = bootstrap(truth, fewer, SPLIT, ("AP50",), SUBSETS)
    low, high = paired_intervals(a, b)["AP50-base"]
    differences = np.array([y - x for x, y in zip(a["values"]["AP50-base"], b["values"]["AP50-base"])])
    figure = b["figures"]["AP50-base"] - a["figures"]["AP50-base"]
    expected = np.percentile(differences, [2.5, 97.5]) - differences.mean() + figure
    assert [low, high] == pytest.approx(expected.tolist()) and high < 0
    unpaired = b["intervals"]["AP50-base"][1] - a["intervals"]["AP50-base"][0]
    assert high < unpaired  # the two vary together
    other = bootstrap(truth, found, SPLIT, ("AP50",), SUBSETS, seed=1)
    assert paired_intervals(a, other) == paired_intervals(a, None) == {}
