"""Evaluation: parity with pycocotools, base / novel arithmetic, streaming over processes, proposal recall."""

import contextlib
import io
import json
import math
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import verify_results
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import register_dataset
from ovdet2.errors import DataError, NumericalError, UsageError
from ovdet2.evaluation import OpenVocabularyEvaluator, format_table, ov_evaluator
from ovdet2.evaluation.coco_ap import class_average_precision, mean_of
from ovdet2.evaluation.proposal_recall import average_recall, covered_iou

FIXTURE = Path(__file__).parents[2] / "shared" / "data" / "coco_eval_fixture"

# Six classes with sparse ids in no order; the last novel one never has ground truth.
SPLIT = Split(
    "test 3/3",
    base=((7, "a"), (3, "b"), (50, "c")),
    novel=((5, "d"), (90, "e"), (1, "f")),
    groups={"odd": (3, 5)},
)


def random_set(seed=0, images=30):
    """A COCO json with crowds and images without boxes, and detections with ties, as COCO result dicts."""
    random = np.random.default_rng(seed)
    data = {
        "categories": [{"id": category_id, "name": name} for category_id, name in sorted(SPLIT.base + SPLIT.novel)],
        "images": [
            {"id": int(image_id), "file_name": f"{image_id}.jpg", "width": 200, "height": 200}
            for image_id in random.permutation(1000)[:images]
        ],
        "annotations": [],
    }
    found = []
    for image in data["images"]:
        for _ in range(random.integers(0, 7)):
            category_id = int(random.choice([7, 3, 50, 5, 90]))
            box = np.concatenate([random.integers(0, 150, 2), random.integers(5, 50, 2)])
            crowd = int(random.random() < 0.15)
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "area": int(box[2] * box[3]),
                    "iscrowd": crowd,
                }
            )
            for _ in range(random.integers(0, 4)):
                moved = box + random.normal(0, 3, 4)
                guess = int(random.choice([category_id, category_id, category_id, 1, 5]))
                found.append((image["id"], guess, moved))
        for _ in range(random.integers(0, 3)):
            found.append((image["id"], int(random.choice(SPLIT.category_ids)), random.uniform(5, 60, 4)))
    detections = [
        {
            "image_id": image_id,
            "category_id": category_id,
            # Eighths and tenths survive the float32 of the model's outputs and make ties.
            "bbox": (np.round(np.maximum(box, 1) * 8) / 8).tolist(),
            "score": float(np.float32(random.integers(1, 9) / 10)),
        }
        for image_id, category_id, box in found
    ]
    return data, detections


def pycocotools_per_class(data, detections, category_ids):
    """{category id: (AP, AP50)} in percent from the reference implementation."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(data))
        truth.createIndex()
        engine = COCOeval(truth, truth.loadRes(json.loads(json.dumps(detections))), "bbox")
        engine.params.catIds = list(category_ids)
        engine.evaluate()
        engine.accumulate()
    precision = engine.eval["precision"][:, :, :, 0, -1]
    return {
        category_id: tuple(
            100 * values.mean() if (values > -1).all() else math.nan
            for values in (precision[:, :, k], precision[0, :, k])
        )
        for k, category_id in enumerate(sorted(category_ids))
    }


def xyxy(boxes):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def instances(detections):
    """Detections of one image as the model gives them."""
    result = Instances((200, 200))
    result.pred_boxes = Boxes(torch.tensor(xyxy([detection["bbox"] for detection in detections])).float())
    result.scores = torch.tensor([detection["score"] for detection in detections]).float()
    position = SPLIT.id_to_contiguous
    result.pred_classes = torch.tensor([position[detection["category_id"]] for detection in detections]).long()
    return result


def proposals(boxes, logits=None):
    result = Instances((200, 200))
    result.proposal_boxes = Boxes(torch.as_tensor(np.asarray(boxes), dtype=torch.float32).reshape(-1, 4))
    result.objectness_logits = torch.arange(len(result.proposal_boxes), 0, -1).float() if logits is None else logits
    return result


def feed(evaluator, data, detections, image_ids=None, proposals_of=None):
    for image_id in [image["id"] for image in data["images"]] if image_ids is None else image_ids:
        output = {"instances": instances([found for found in detections if found["image_id"] == image_id])}
        if proposals_of is not None:
            output["proposals"] = proposals_of(image_id)
        evaluator.process([{"image_id": image_id}], [output])


@pytest.fixture
def make_evaluator(tmp_path):
    """Registers a json and gives its evaluator, reset."""
    names = []

    def make(data, split=SPLIT, folder="out", **options):
        name = f"test_{uuid.uuid4().hex}"
        names.append(name)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        register_dataset(name, path, tmp_path, split)
        evaluator = OpenVocabularyEvaluator(name, tmp_path / folder, **options)
        evaluator.reset()
        return evaluator

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


# --- average precision --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FIXTURE.is_dir(), reason="needs ../shared/data/coco_eval_fixture")
def test_coco_fixture_equals_the_published_figures_and_pycocotools_per_class():
    data = json.loads((FIXTURE / "instances_val2014_100.json").read_text())
    detections = json.loads((FIXTURE / "results" / "instances_val2014_fakebbox100_results.json").read_text())
    expected = json.loads((FIXTURE / "expected.json").read_text())["bbox"]
    reference = pycocotools_per_class(data, detections, [category["id"] for category in data["categories"]])
    ours = {}
    for category_id in reference:
        truth = [annotation for annotation in data["annotations"] if annotation["category_id"] == category_id]
        found = [detection for detection in detections if detection["category_id"] == category_id]
        ours[category_id] = class_average_precision(
            [annotation["image_id"] for annotation in truth],
            xyxy([annotation["bbox"] for annotation in truth]),
            [annotation["iscrowd"] for annotation in truth],
            [detection["image_id"] for detection in found],
            xyxy([detection["bbox"] for detection in found]),
            [detection["score"] for detection in found],
        )
        np.testing.assert_allclose(ours[category_id], reference[category_id], atol=1e-6)
    assert abs(mean_of(ap for ap, _ in ours.values()) / 100 - expected["AP_all"]) < 1e-6
    assert abs(mean_of(ap50 for _, ap50 in ours.values()) / 100 - expected["AP_50"]) < 1e-6
    assert sum(math.isnan(ap) for ap, _ in ours.values()) > 0  # the fixture has classes without ground truth


@pytest.mark.parametrize("seed", range(4))
def test_evaluator_equals_pycocotools_with_crowds_ties_and_empty_images(make_evaluator, tmp_path, seed):
    data, detections = random_set(seed)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    results = evaluator.evaluate()["bbox"]
    reference = pycocotools_per_class(data, detections, SPLIT.category_ids)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for row in report["per_class"]:
        for metric, value in zip(("AP", "AP50"), reference[row["category_id"]]):
            assert (row[metric] is None) == math.isnan(value)
            assert row[metric] is None or abs(row[metric] - value) < 1e-6
    for subset, ids in (("novel", (5, 90)), ("base", (7, 3, 50)), ("odd", (3, 5))):
        assert abs(results[f"AP-{subset}"] - np.mean([reference[category_id][0] for category_id in ids])) < 1e-6
        assert abs(results[f"AP50-{subset}"] - np.mean([reference[category_id][1] for category_id in ids])) < 1e-6


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
    assert third.evaluate()["bbox"] == pytest.approx(expected["bbox"], rel=1e-14)


def test_without_any_detection_everything_is_zero(make_evaluator, tmp_path):
    data, _ = random_set(3)
    evaluator = make_evaluator(data)
    feed(evaluator, data, [])
    results = evaluator.evaluate()
    assert set(results["bbox"].values()) == {0.0}
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


# --- processes, files, errors ---------------------------------------------------------------------------------------


def _as_rank(monkeypatch, rank, tokens=()):
    """Make this process believe it is ``rank`` of two; ``tokens`` are what rank 0 would gather."""
    monkeypatch.setattr(ov_evaluator.comm, "get_rank", lambda: rank)
    monkeypatch.setattr(ov_evaluator.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(ov_evaluator.comm, "is_main_process", lambda: rank == 0)
    monkeypatch.setattr(ov_evaluator.comm, "gather", lambda value: list(tokens) if rank == 0 else [])
    monkeypatch.setattr(ov_evaluator.comm, "all_gather", lambda value: [value, None])


def _two_ranks(monkeypatch, evaluators, data, detections, shares):
    _as_rank(monkeypatch, 1)
    evaluators[1].reset()
    feed(evaluators[1], data, detections, shares[1], lambda image_id: proposals([[0, 0, 30, 30], [9, 9, 60, 60]]))
    assert evaluators[1].evaluate() == {}
    _as_rank(monkeypatch, 0, [evaluator._writer.token for evaluator in evaluators])
    evaluators[0].reset()
    _as_rank(monkeypatch, 0, [evaluator._writer.token for evaluator in evaluators])
    feed(evaluators[0], data, detections, shares[0], lambda image_id: proposals([[0, 0, 30, 30], [9, 9, 60, 60]]))
    return evaluators[0].evaluate()


def test_two_processes_equal_one(make_evaluator, monkeypatch, tmp_path):
    data, detections = random_set(6)
    single = make_evaluator(data, folder="single")
    feed(single, data, detections, proposals_of=lambda image_id: proposals([[0, 0, 30, 30], [9, 9, 60, 60]]))
    expected = single.evaluate()
    pair = [make_evaluator(data, folder="pair"), make_evaluator(data, folder="pair")]
    image_ids = [image["id"] for image in data["images"]]
    results = _two_ranks(monkeypatch, pair, data, detections, (image_ids[:11], image_ids[11:]))
    assert results == expected
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["predictions.jsonl", "report.json"]


@pytest.mark.parametrize(
    "first, second, named",
    [(10, 11, "1 images without predictions, id {10}"), (11, 10, "1 images predicted twice, id {10}")],
)
def test_a_missing_or_doubled_image_is_refused(make_evaluator, monkeypatch, tmp_path, first, second, named):
    data, detections = random_set(6)
    image_ids = [image["id"] for image in data["images"]]
    pair = [make_evaluator(data), make_evaluator(data)]
    with pytest.raises(DataError, match=named.replace("{10}", str(image_ids[10]))):
        _two_ranks(monkeypatch, pair, data, detections, (image_ids[:first], image_ids[second:]))
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
    assert (tmp_path / "out" / "predictions-rank0000.jsonl").exists()


def test_a_file_of_an_earlier_run_is_not_taken_for_one_of_this(make_evaluator, monkeypatch, tmp_path):
    data, detections = random_set(6)
    stale = tmp_path / "out" / "predictions-rank0001.jsonl"
    pair = [make_evaluator(data), make_evaluator(data)]
    _as_rank(monkeypatch, 0, [pair[0]._writer.token, "of the other process"])
    stale.write_text('{"token": "of last week"}\n')
    feed(pair[0], data, detections)
    with pytest.raises(DataError, match="rank0001.jsonl is not of this run"):
        pair[0].evaluate()
    pair[0].reset()
    _as_rank(monkeypatch, 0, [pair[0]._writer.token, "of the other process"])
    stale.unlink()
    with pytest.raises(DataError, match="rank0001.jsonl does not exist.*share"):
        pair[0].evaluate()


def test_an_evaluator_can_be_used_again(make_evaluator):
    data, detections = random_set(6)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    first = evaluator.evaluate()
    evaluator.reset()
    feed(evaluator, data, detections[:40], [data["images"][0]["id"]])  # interrupted
    evaluator.reset()
    feed(evaluator, data, detections)
    assert evaluator.evaluate() == first


def test_bad_predictions_are_named(make_evaluator):
    data, detections = random_set(6)
    evaluator = make_evaluator(data)
    image_id = data["images"][0]["id"]
    with pytest.raises(DataError, match="image 5555 is not in"):
        evaluator.process([{"image_id": 5555}], [{"instances": instances([])}])
    found = instances([{**detections[0], "image_id": image_id}])
    found.scores[0] = float("nan")
    with pytest.raises(NumericalError, match=f"image {image_id} has a detection"):
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
    found = instances([{**detections[0], "image_id": image_id}])
    found.pred_classes[0] = 6
    with pytest.raises(DataError, match=f"image {image_id} has a detection of class 6.*6 classes"):
        evaluator.process([{"image_id": image_id}], [{"instances": found}])


def test_proposals_of_some_images_only_are_refused(make_evaluator):
    data, detections = random_set(6)
    evaluator = make_evaluator(data)
    image_ids = [image["id"] for image in data["images"]]
    feed(evaluator, data, detections, image_ids[:4], lambda image_id: proposals([[0, 0, 9, 9]]))
    feed(evaluator, data, detections, image_ids[4:])
    with pytest.raises(DataError, match="4 of 30 images have proposals"):
        evaluator.evaluate()


def test_a_data_set_without_a_split_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no base / novel split"):
        OpenVocabularyEvaluator(f"test_{uuid.uuid4().hex}", tmp_path)


# --- proposal recall ------------------------------------------------------------------------------------------------


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


# --- the report -----------------------------------------------------------------------------------------------------


def test_report_and_table_name_protocol_images_and_classes(make_evaluator, tmp_path, caplog):
    data, detections = random_set(8)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections, proposals_of=lambda image_id: proposals([[0, 0, 30, 30]]))
    with caplog.at_level("INFO", logger="ovdet2"):
        results = evaluator.evaluate()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schema"] == "ovdet2/report/1"
    assert (report["split"], report["images"], report["detections_per_image"]) == ("test 3/3", 30, 100)
    assert report["bbox"] == results["bbox"] and report["proposals"] == results["proposals"]
    assert report["detections"] == len(detections)
    assert list(results["bbox"])[:4] == ["AP50-novel", "AP50-base", "AP50-all", "AP50-odd"]
    assert [row["category_id"] for row in report["per_class"]] == list(SPLIT.category_ids)
    assert report["per_class"][3] | {"AP": 0, "AP50": 0, "boxes": 0} == {
        "category_id": 5, "name": "d", "subset": "novel", "boxes": 0, "AP": 0, "AP50": 0,
    }  # fmt: skip
    table = format_table(report)
    assert table in caplog.text
    for part in ("test 3/3", "generalized", "IoU 0.50", "100 detections per image", "30 images", " s\n", "2/3", "3/3"):
        assert part in table
    assert f"{results['bbox']['AP50-novel']:.2f}" in table


def test_expected_results_of_detectron2_read_the_results(make_evaluator):
    from detectron2.config import get_cfg

    data, detections = random_set(8)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    results = evaluator.evaluate()
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP50-novel", results["bbox"]["AP50-novel"], 0.01]]
    assert verify_results(cfg, results)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP50-novel", results["bbox"]["AP50-novel"] + 1, 0.5]]
    with pytest.raises(SystemExit):
        verify_results(cfg, results)
