"""Predictions on disk: several processes, what is left of earlier runs, errors that name the culprit."""

import json
import uuid

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.engine.launch import launch
from ovdet2.errors import DataError, NumericalError, UsageError
from ovdet2.evaluation import OpenVocabularyEvaluator, load_evaluation, ov_evaluator
from ovdet2.evaluation.predictions import read_predictions
from tests.evaluation_sets import (
    SIDE,
    evaluate_in_group,
    feed,
    instances,
    proposals,
    random_set,
    with_masks,
)


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


def test_one_two_and_three_processes_write_the_same_files(tmp_path):
    """Byte by byte, and the report but for what it says of the run itself."""
    data, _ = with_masks(*random_set(11))
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    try:
        for processes in (1, 2, 3):
            launch(evaluate_in_group, processes, args=(path, tmp_path / f"of{processes}"), use_cuda=False)
    finally:
        DatasetCatalog.remove("test_group_of1")
        MetadataCatalog.pop("test_group_of1", None)
    predictions = {(tmp_path / f"of{n}" / "predictions.jsonl").read_bytes() for n in (1, 2, 3)}
    assert len(predictions) == 1
    ids = [json.loads(line)["image_id"] for line in predictions.pop().splitlines()]
    assert ids == sorted(image["id"] for image in data["images"])
    reports = []
    for n in (1, 2, 3):
        report = json.loads((tmp_path / f"of{n}" / "report.json").read_text())
        assert report.pop("processes") == n and report.pop("seconds") > 0 and report.pop("finished")
        assert report.pop("dataset") == f"test_group_of{n}"
        reports.append(report)
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["segm"]["AP-all"] > 0 and "AR@100-all" in reports[0]["proposals"]
    assert len(reports[0]["decoder_layers"]) == 3


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


def test_masks_of_some_images_only_or_of_another_size_are_refused(make_evaluator):
    data, detections = with_masks(*random_set(6))
    evaluator = make_evaluator(data, masks=True)
    image_ids = [image["id"] for image in data["images"] if any(d["image_id"] == image["id"] for d in detections)]
    some = [d for d in detections if d["image_id"] == image_ids[0]]
    bad = instances(some)
    bad.pred_masks = bad.pred_masks[:, :50]
    with pytest.raises(
        DataError, match=f"image {image_ids[0]} has masks of 50 x {SIDE} pixels, but is {SIDE} x {SIDE}"
    ):
        evaluator.process([{"image_id": image_ids[0]}], [{"instances": bad}])
    feed(evaluator, data, [{k: v for k, v in d.items() if k != "segmentation"} for d in some], [image_ids[0]])
    feed(evaluator, data, detections, [image["id"] for image in data["images"] if image["id"] != image_ids[0]])
    with pytest.raises(DataError, match=f"{len(image_ids) - 1} of {len(image_ids)} images have masks"):
        evaluator.evaluate()


def test_masks_go_to_disk_and_come_back(make_evaluator, tmp_path):
    data, detections = with_masks(*random_set(6))
    evaluator = make_evaluator(data, masks=True)
    feed(evaluator, data, detections)
    evaluator.evaluate()
    found = read_predictions(tmp_path / "out" / "predictions.jsonl").detections
    assert len(found.masks) == len(found) == len(detections)
    for row in (0, 7, len(found) - 1, -1):
        equal = [
            d["segmentation"]
            for d in detections
            if (d["image_id"], d["category_id"]) == (found.image_ids[row], found.category_ids[row])
        ]
        assert found.masks[row] in equal
    assert list(found.masks)[-1] == found.masks[-1]
    with pytest.raises(IndexError, match=f"mask {len(found)} of {len(found)}"):
        found.masks[len(found)]


def test_an_evaluation_is_read_again_from_its_folder(make_evaluator, tmp_path):
    data, detections = with_masks(*random_set(6))
    evaluator = make_evaluator(data, masks=True)
    assert evaluator.evaluation is None
    feed(evaluator, data, detections)
    evaluator.evaluate()
    name = evaluator.evaluation.report["dataset"]
    read = load_evaluation(tmp_path / "out", name)
    assert read.report == evaluator.evaluation.report
    for key in ("ann_ids", "image_ids", "category_ids", "boxes_xyxy", "areas", "crowd"):
        assert (getattr(read.truth, key) == getattr(evaluator.evaluation.truth, key)).all()
    for key in ("image_ids", "category_ids", "scores", "boxes_xyxy"):
        assert (getattr(read.detections, key) == getattr(evaluator.evaluation.detections, key)).all()
    with pytest.raises(UsageError, match=f"holds an evaluation on '{name}', not on 'another'"):
        load_evaluation(tmp_path / "out", "another")
    (tmp_path / f"{name}.json").write_text(json.dumps({**data, "info": "changed"}))
    with pytest.raises(DataError, match="is not the file that .* was evaluated on"):
        load_evaluation(tmp_path / "out", name)
    (tmp_path / "out" / "predictions.jsonl").unlink()
    with pytest.raises(DataError, match="predictions.jsonl does not exist"):
        load_evaluation(tmp_path / "out", name)


def test_detections_of_distractors_take_part_in_the_cut_and_are_counted(make_evaluator):
    data, detections = random_set(6)
    image_id = detections[0]["image_id"]
    found = instances([{**detections[0], "score": score} for score in (0.9, 0.8, 0.7)])
    found.pred_classes = torch.tensor([6, 0, 0])
    evaluator = make_evaluator(data, max_detections=2, distractors=("street sign",))
    feed(evaluator, data, [], [image["id"] for image in data["images"] if image["id"] != image_id])
    evaluator.process([{"image_id": image_id}], [{"instances": found}])
    evaluator.evaluate()
    report, kept = evaluator.evaluation.report, evaluator.evaluation.detections
    assert (report["distractors"], report["distractor_detections"]) == (["street sign"], 1)
    assert len(kept) == report["detections"] == 1 and kept.scores[0] == pytest.approx(0.8)
    evaluator.reset()
    found.pred_classes = torch.tensor([7, 0, 0])
    with pytest.raises(DataError, match="detection of class 7, but .* has the 7 classes 0 to 6, distractors included"):
        evaluator.process([{"image_id": image_id}], [{"instances": found}])


def test_predictions_of_an_evaluation_that_stopped_are_measured_again(make_evaluator, tmp_path):
    data, detections = random_set(4)
    evaluator = make_evaluator(data, folder="stopped")
    feed(evaluator, data, detections)
    expected = evaluator.evaluate()
    (tmp_path / "stopped" / "report.json").unlink()
    again = make_evaluator(data, folder="stopped").measure_again()
    assert again.report["bbox"] == evaluator.evaluation.report["bbox"] and expected["bbox"]
    assert (tmp_path / "stopped" / "report.json").is_file()
    with pytest.raises(DataError, match="does not have the images"):
        make_evaluator(random_set(5)[0], folder="stopped").measure_again()
    with pytest.raises(DataError, match="does not exist: evaluate"):
        make_evaluator(data, folder="nothing").measure_again()


def test_a_new_evaluation_leaves_no_report_of_the_old_one(make_evaluator, tmp_path):
    data, detections = random_set(4)
    evaluator = make_evaluator(data, folder="twice")
    feed(evaluator, data, detections)
    evaluator.evaluate()
    (tmp_path / "twice" / "report.html").write_text("old")
    evaluator.reset()
    assert [path.name for path in (tmp_path / "twice").glob("report*")] == []
