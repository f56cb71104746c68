"""Average precision: parity with pycocotools, base / novel arithmetic, what changes nothing."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation import format_table
from ovdet2.evaluation.coco_ap import evaluate_classes, mean_of
from ovdet2.evaluation.matching import BACKGROUND, LEFT_OUT, TRUE, match
from tests.evaluation_sets import (
    SHARED,
    SPLIT,
    columns_of,
    feed,
    instances,
    proposals,
    pycocotools_per_class,
    random_set,
    with_masks,
)

FIXTURE = SHARED / "coco_eval_fixture"


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs ../shared/data/coco_eval_fixture")
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_coco_fixture_equals_the_published_figures(task):
    data = json.loads((FIXTURE / "instances_val2014_100.json").read_text())
    detections = json.loads((FIXTURE / "results" / f"instances_val2014_fake{task}100_results.json").read_text())
    expected = json.loads((FIXTURE / "expected.json").read_text())[task]
    category_ids = [category["id"] for category in data["categories"]]
    ours = evaluate_classes(*columns_of(data, detections), category_ids, task, limits=(1, 10, 100))
    names = {"AP_all": "AP", "AP_50": "AP50", "AP_75": "AP75", "AP_small": "APs", "AP_medium": "APm", "AP_large": "APl"}
    names |= {"AR_1": "AR@1", "AR_10": "AR@10", "AR_100": "AR@100"}
    names |= {"AR_small": "ARs", "AR_medium": "ARm", "AR_large": "ARl"}
    assert names.keys() == expected.keys()
    for theirs, name in names.items():
        assert abs(mean_of(figures[name] for figures in ours.values()) / 100 - expected[theirs]) < 1e-6, name
    assert sum(math.isnan(figures["AP"]) for figures in ours.values()) > 0  # classes without ground truth


@pytest.mark.parametrize("seed, task", [(0, "bbox"), (1, "bbox"), (2, "segm"), (3, "segm")])
def test_evaluator_equals_pycocotools_with_crowds_ties_and_empty_images(make_evaluator, tmp_path, seed, task):
    data, detections = random_set(seed)
    if task == "segm":
        with_masks(data, detections)
    evaluator = make_evaluator(data, masks=task == "segm")
    feed(evaluator, data, detections)
    results = evaluator.evaluate()
    assert ("segm" in results) == (task == "segm")
    reference = pycocotools_per_class(data, detections, SPLIT.category_ids, task)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in report["per_class"]:
        ours = row if task == "bbox" else row["segm"]
        for name, value in reference[row["category_id"]].items():
            assert (ours[name] is None) == math.isnan(value), name
            assert ours[name] is None or abs(ours[name] - value) < 1e-6, name
    for subset, ids in (("novel", (5, 90)), ("base", (7, 3, 50)), ("odd", (3, 5))):
        for name in reference[5]:
            mean = np.nanmean([reference[category_id][name] for category_id in ids])
            ours = results[task][f"{name}-{subset}"]
            assert (math.isnan(ours) and math.isnan(mean)) or abs(ours - mean) < 1e-6


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_order_of_images_and_detections_and_company_of_classes_change_nothing(seed, class_count):
    """Class by class is all at once; K = 1 included. Equal scores keep their order, so the scores differ."""
    random = np.random.default_rng(seed)
    data, detections = random_set(seed, images=6)
    for detection, score in zip(detections, random.permutation(len(detections))):
        detection["score"] = (1 + float(score)) / (1 + len(detections))
    category_ids = random.permutation(SPLIT.category_ids)[:class_count].tolist()
    expected = evaluate_classes(*columns_of(data, detections), category_ids)
    for records in (data["images"], data["annotations"], detections):
        random.shuffle(records)
    shuffled = columns_of(data, detections)
    assert evaluate_classes(*shuffled, category_ids) == expected
    assert {k: v for i in category_ids for k, v in evaluate_classes(*shuffled, [i]).items()} == expected
    # Nor do an image without anything and detections of other classes.
    data["images"].append({**data["images"][0], "id": 5000})
    others = [found for found in detections if found["category_id"] in category_ids]
    assert evaluate_classes(*columns_of(data, others), category_ids) == expected


def test_neither_detections_nor_truth(registered):
    data, _ = random_set(0)
    none = {**data, "annotations": []}
    zero = evaluate_classes(*columns_of(data, []), SPLIT.category_ids)
    assert (zero[7]["AP"], zero[7]["AR@100"]) == (0, 0) and math.isnan(zero[1]["AP"])
    undefined = evaluate_classes(*columns_of(none, []), SPLIT.category_ids)
    assert all(math.isnan(value) for figures in undefined.values() for value in figures.values())


def test_all_is_the_mean_of_base_and_novel_weighted_by_classes_with_ground_truth(make_evaluator, tmp_path):
    data, detections = random_set(5)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    results = evaluator.evaluate()["bbox"]
    classes = json.loads((tmp_path / "out" / "report.json").read_text())["classes"]
    b, n = classes["base"]["with_ground_truth"], classes["novel"]["with_ground_truth"]
    assert (b, n) == (3, 2)
    for metric in ("AP50", "AP"):
        mean = (b * results[f"{metric}-base"] + n * results[f"{metric}-novel"]) / (b + n)
        assert results[f"{metric}-all"] == pytest.approx(mean, rel=1e-14)


def test_perfect_detections_of_novel_classes_only(make_evaluator):
    data, _ = random_set(1)
    detections = [
        {**annotation, "score": 0.5}
        for annotation in data["annotations"]
        if annotation["category_id"] in (5, 90) and not annotation["iscrowd"]
    ]
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    results = evaluator.evaluate()["bbox"]
    assert (results["AP50-novel"], results["AP-novel"], results["AP50-base"], results["AP-base"]) == (100, 100, 0, 0)
    assert results["AP50-all"] == pytest.approx(40)


def test_order_of_categories_and_images_changes_nothing(make_evaluator):
    data, detections = random_set(2)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    expected = evaluator.evaluate()
    shuffled = {key: list(reversed(records)) for key, records in data.items()}
    other = make_evaluator(shuffled)
    feed(other, shuffled, detections)
    assert other.evaluate() == expected
    # Nor does the order of classes within the split.
    turned = Split("turned", base=SPLIT.base[::-1], novel=SPLIT.novel[::-1], groups=SPLIT.groups)
    third = make_evaluator(data, split=turned)
    position = {SPLIT.id_to_contiguous[i]: turned.id_to_contiguous[i] for i in SPLIT.category_ids}
    for image in data["images"]:
        found = instances([detection for detection in detections if detection["image_id"] == image["id"]])
        found.pred_classes = torch.tensor([position[int(index)] for index in found.pred_classes]).long()
        third.process([{"image_id": image["id"]}], [{"instances": found}])
    assert third.evaluate()["bbox"] == pytest.approx(expected["bbox"], rel=1e-14, nan_ok=True)


def test_without_any_detection_everything_is_zero(make_evaluator, tmp_path):
    data, _ = random_set(3)
    evaluator = make_evaluator(data)
    feed(evaluator, data, [])
    results = evaluator.evaluate()
    assert {value for value in results["bbox"].values() if not math.isnan(value)} == {0.0}
    assert "proposals" not in results


def test_a_subset_without_ground_truth_is_nan_and_null(make_evaluator, tmp_path):
    data, detections = random_set(3)
    data["annotations"] = [annotation for annotation in data["annotations"] if annotation["category_id"] in (7, 3)]
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections, proposals_of=lambda image_id: proposals([[0, 0, 9, 9]]))
    results = evaluator.evaluate()
    text = (tmp_path / "out" / "report.json").read_text()
    assert math.isnan(results["bbox"]["AP50-novel"]) and math.isnan(results["proposals"]["AR@100-novel"])
    assert results["bbox"]["AP50-all"] == results["bbox"]["AP50-base"]
    assert "NaN" not in text
    report = json.loads(text)
    assert report["bbox"]["AP50-novel"] is None
    assert report["classes"]["novel"]["with_ground_truth"] == 0
    assert " - " in format_table(report)


def test_a_class_with_crowds_alone_has_no_ground_truth(make_evaluator, tmp_path):
    data, detections = random_set(2)
    for annotation in data["annotations"]:
        annotation["iscrowd"] |= annotation["category_id"] == 5
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    evaluator.evaluate()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = (row for row in report["per_class"] if row["category_id"] == 5)
    assert (row["boxes"], row["AP"], row["AP50"]) == (0, None, None)
    assert report["classes"]["novel"]["with_ground_truth"] == 1


def test_only_the_best_detections_of_an_image_count(make_evaluator, tmp_path):
    data, _ = random_set(4, images=1)
    data["annotations"] = [
        {"id": 1, "image_id": data["images"][0]["id"], "category_id": 7, "bbox": [10, 10, 20, 20]},
        {"id": 2, "image_id": data["images"][0]["id"], "category_id": 5, "bbox": [50, 50, 20, 20]},
    ]
    detections = [
        {"image_id": data["images"][0]["id"], "category_id": 5, "bbox": [50, 50, 20, 20], "score": 0.6},
        {"image_id": data["images"][0]["id"], "category_id": 7, "bbox": [10, 10, 20, 20], "score": 0.7},
        {"image_id": data["images"][0]["id"], "category_id": 3, "bbox": [1, 1, 9, 9], "score": 0.8},
    ]
    evaluator = make_evaluator(data, max_detections=2)
    feed(evaluator, data, detections)
    results = evaluator.evaluate()["bbox"]
    assert (results["AP-base"], results["AP-novel"]) == (100, 0)
    (line,) = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(line)["category_ids"] == [3, 7]


def with_a_difficult_object():
    """A difficult object of 100 x 100, a small detection inside of it and one that fits it, and a found object."""
    annotation = {"category_id": 7, "iscrowd": 0, "image_id": 1}
    boxes = [([0, 0, 100, 100], 1), ([120, 120, 40, 40], 0)]
    data = {
        "categories": [{"id": category_id, "name": name} for category_id, name in SPLIT.base + SPLIT.novel],
        "images": [{"id": 1, "file_name": "1.jpg", "width": 200, "height": 200}],
        "annotations": [
            {**annotation, "id": number, "bbox": box, "area": box[2] * box[3], "iscrowd": flag}
            for number, (box, flag) in enumerate(boxes, start=1)
        ],
    }
    found = [([10, 10, 20, 20], 0.9), ([2, 2, 98, 98], 0.8), ([0, 0, 99, 99], 0.7), ([120, 120, 40, 40], 0.6)]
    return data, [{"image_id": 1, "category_id": 7, "bbox": box, "score": score} for box, score in found]


def test_difficult_objects_of_voc_are_found_by_iou_and_crowds_by_share():
    truth, detections = columns_of(*with_a_difficult_object())
    as_crowd = evaluate_classes(truth, detections, [7])[7]
    as_object = evaluate_classes(truth, detections, [7], crowds=False)[7]
    assert as_crowd["AP50"] == pytest.approx(100)  # all three lie in it
    assert as_object["AP50"] == pytest.approx(50)  # the small one is false, the two that fit count neither way
    assert match(truth, detections).outcome.tolist() == [LEFT_OUT, LEFT_OUT, LEFT_OUT, TRUE]
    assert match(truth, detections, crowds=False).outcome.tolist() == [BACKGROUND, LEFT_OUT, LEFT_OUT, TRUE]


@pytest.mark.parametrize("flag, by_share", [("iscrowd", True), ("ignore", False)])
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_an_ignored_object_is_matched_by_iou_and_a_crowd_by_share(flag, by_share, task, make_evaluator):
    """A detection of half of such a region is no error on a crowd; on one difficult object it is."""
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    box = {"image_id": 1, "category_id": 5, "area": 400, "segmentation": square}
    data = {
        "images": [{"id": 1, "file_name": "1.png", "width": 100, "height": 80}],
        "annotations": [
            {**box, "id": 1, "bbox": [10, 10, 20, 20]},
            {**box, "id": 2, "bbox": [50, 10, 40, 40], "segmentation": [[50, 10, 90, 10, 90, 50, 50, 50]], flag: 1},
        ],
        "categories": [{"id": number, "name": name} for number, name in zip(SPLIT.category_ids, SPLIT.names)],
    }

    def figure(*extra):
        evaluator = make_evaluator(data, masks=True, folder=f"out{len(extra)}{flag}{task}{extra}")
        found = Instances((80, 100))
        rows = [*extra, (10, 10, 30, 30)]
        found.pred_boxes = Boxes(torch.tensor(rows, dtype=torch.float32))
        found.scores = torch.linspace(0.9, 0.5, len(rows))
        found.pred_classes = torch.full((len(rows),), SPLIT.category_ids.index(5))
        found.pred_masks = torch.zeros(len(rows), 80, 100, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(found.pred_masks, rows):
            mask[y1:y2, x1:x2] = True
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        results = evaluator.evaluate()[task]
        evaluation = evaluator.evaluation
        return results["AP50-novel"], match(evaluation.truth, evaluation.detections).outcome.tolist()

    assert figure() == (100, [TRUE])
    assert figure((50, 10, 90, 50)) == (100, [LEFT_OUT, TRUE])
    part = figure((52, 12, 66, 26))
    assert part == ((100, [LEFT_OUT, TRUE]) if by_share else (50, [BACKGROUND, TRUE]))
