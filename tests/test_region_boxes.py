"""Which boxes a region cache holds: sources and filters."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from ovdet2.caches.region_boxes import AnnotationBoxes, BoxFilters, FileBoxes, FoundBoxes, apply_filters
from ovdet2.errors import DataError


def found(boxes, scores=None, ids=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.ones(len(boxes)) if scores is None else torch.tensor(scores, dtype=torch.float32)
    return FoundBoxes(
        boxes, scores, torch.full((len(boxes),), -1) if ids is None else torch.tensor(ids, dtype=torch.int64)
    )


numbers = st.floats(-30, 150, allow_nan=False, width=32)
filters = st.builds(
    BoxFilters,
    min_score=st.none() | st.floats(0, 1),
    min_side=st.none() | st.floats(0, 40),
    nms=st.none() | st.floats(0.1, 1),
    top=st.none() | st.integers(1, 5),
)


def reference(rows, chosen, height, width):
    """Numbers of the boxes that stay, one step after the other in plain Python; None of NMS."""
    kept = []
    for number, (x0, y0, x1, y1, score) in enumerate(rows):
        x0, x1 = (min(max(x, 0.0), width) for x in (x0, x1))
        y0, y1 = (min(max(y, 0.0), height) for y in (y0, y1))
        side = min(np.float32(x1) - np.float32(x0), np.float32(y1) - np.float32(y0))
        if side <= 0 or (chosen.min_side is not None and side < np.float32(chosen.min_side)):
            continue
        if chosen.min_score is not None and score < np.float32(chosen.min_score):
            continue
        kept.append((number, score))
    if chosen.top is not None and len(kept) > chosen.top:
        kept = sorted(kept, key=lambda pair: -pair[1])[: chosen.top]
    return [number for number, _ in kept]


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers, st.floats(0, 1, width=32)), max_size=12), filters)
@settings(max_examples=200, deadline=None)
def test_filters_against_a_reference(rows, chosen):
    before = found([r[:4] for r in rows], [r[4] for r in rows], list(range(len(rows))))
    without_nms = replace(chosen, nms=None)
    after = apply_filters(before, without_nms, 80, 120)
    assert after.ann_ids.tolist() == reference(rows, without_nms, 80.0, 120.0)
    assert torch.equal(after.scores, before.scores[after.ann_ids])
    boxes = torch.minimum(before.boxes_xyxy.clamp(min=0), torch.tensor([120.0, 80, 120, 80]))
    assert torch.equal(after.boxes_xyxy, boxes[after.ann_ids])


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers, st.floats(0, 1, width=32)), max_size=12))
@settings(max_examples=50, deadline=None)
def test_nms_leaves_the_best_and_no_overlap(rows):
    """Whatever goes overlaps a better one that stays."""
    before = apply_filters(found([r[:4] for r in rows], [r[4] for r in rows]), BoxFilters(), 80, 120)
    after = apply_filters(before, BoxFilters(nms=0.5), 80, 120)
    overlap = box_iou(after.boxes_xyxy, after.boxes_xyxy).fill_diagonal_(0)
    assert (overlap <= 0.5 + 1e-6).all() and after.scores.tolist() == sorted(after.scores.tolist(), reverse=True)
    for box, score in zip(before.boxes_xyxy, before.scores):
        better = after.scores >= score
        assert (box_iou(box[None], after.boxes_xyxy[better]) > 0.5 - 1e-6).any()


def test_a_small_box_is_tested_by_width_or_height_wherever_it_lies():
    """Published filters test y and w by mistake, and drop boxes at the top edge of the image."""
    boxes = found([[0, 0, 40, 40], [50, 2, 90, 60], [10, 10, 100, 20], [10, 10, 20, 70]], ids=[0, 1, 2, 3])
    assert apply_filters(boxes, BoxFilters(min_side=16), 80, 120).ann_ids.tolist() == [0, 1]


def test_no_and_many_boxes():
    assert len(apply_filters(found([]), BoxFilters(0.1, 2, 0.5, 3), 80, 120)) == 0
    many = found(torch.rand(10_000, 4).sort(dim=1).values[:, [0, 1, 2, 3]].tolist())
    assert len(apply_filters(many, BoxFilters(top=300), 1, 1)) == 300
    assert len(apply_filters(found([[0.0, float("nan"), 5, 5]]), BoxFilters(), 80, 120)) == 0


def test_annotations_without_crowds():
    box = {"bbox": [10.0, 20.0, 30.0, 40.0], "category_id": 0}
    record = {"image_id": 4, "annotations": [box | {"id": 7}, box | {"id": 8, "iscrowd": 1}]}
    boxes = AnnotationBoxes()(record)
    assert boxes.boxes_xyxy.tolist() == [[10, 20, 40, 60]] and boxes.ann_ids.tolist() == [7]
    assert len(AnnotationBoxes()({"image_id": 4, "annotations": []})) == 0
    with pytest.raises(DataError, match="image id 4 has an annotation without id"):
        AnnotationBoxes()({"image_id": 4, "annotations": [box]})


RESULTS = [
    {"image_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5, "category_id": 1},
    {"image_id": 2, "bbox": [5, 6, 7, 8], "score": 0.25, "category_id": 3},
    {"image_id": 9, "bbox": [9, 9, 1, 1], "score": 0.75, "category_id": 1},
]


def test_coco_results(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    source = FileBoxes(path)
    assert source.require_images([1, 2, 3, 9]) == 2 and len(source({"image_id": 3})) == 0
    with pytest.raises(DataError, match=r"for 2 images \(ids \[2, 9\], ...\), none of which is in the data set"):
        source.require_images([1, 3])
    nine = source({"image_id": 9})
    assert nine.boxes_xyxy.tolist() == [[1, 2, 4, 6], [9, 9, 10, 10]] and nine.scores.tolist() == [0.5, 0.75]
    assert nine.ann_ids.tolist() == [-1, -1] and len(source.recipe()["file_sha256"]) == 64
    path.write_text("[]")
    assert len(FileBoxes(path)({"image_id": 9})) == 0


@pytest.mark.parametrize("mode", [BoxMode.XYXY_ABS, BoxMode.XYWH_ABS])
@pytest.mark.parametrize("ids, scores", [("ids", "objectness_logits"), ("indexes", "scores")])
def test_proposal_file_of_detectron2(tmp_path, mode, ids, scores):
    path = tmp_path / "proposals.pkl"
    boxes = [np.array([[1, 2, 30, 40]], np.float32), np.zeros((0, 4), np.float32), np.array([[0, 0, 5, 5.0]] * 2)]
    values = [np.array([2.0], np.float32), np.zeros(0, np.float32), np.array([-1.0, 0.5])]
    path.write_bytes(pickle.dumps({ids: [5, 6, 7], "boxes": boxes, scores: values, "bbox_mode": mode}))
    source = FileBoxes(path)
    five = source({"image_id": 5})
    assert five.boxes_xyxy.tolist() == [[1, 2, 30, 40] if mode == BoxMode.XYXY_ABS else [1, 2, 31, 42]]
    assert five.scores.item() == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    assert len(source({"image_id": 6})) == 0 and len(source({"image_id": 7})) == 2


class Malicious:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("b.json", b'[{"image_id": 1}]', "b.json is no COCO-results file .KeyError: 'bbox'"),
        ("b.json", b'{"a": 1}', "b.json is no COCO-results file"),
        ("b.json", b'[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 7}]', "scores outside .0, 1."),
        ("b.pkl", pickle.dumps({"ids": [1]}), "no proposal file of Detectron2 .KeyError"),
        ("b.pkl", pickle.dumps([1]), "no proposal file of Detectron2"),
        ("b.pkl", pickle.dumps({"ids": [1], "boxes": [Malicious()]}), "imports builtins.print"),
        ("b.pkl", b"\x80\x04x", "no proposal file"),
        ("b.txt", b"", "neither a COCO-results .json nor a proposal file"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        FileBoxes(tmp_path / name)


def test_a_missing_file():
    with pytest.raises(DataError, match="nowhere.pkl.*No such file"):
        FileBoxes("nowhere.pkl")
