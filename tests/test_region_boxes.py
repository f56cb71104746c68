"""Which boxes a region cache holds: sources and filters."""

import json
import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from ovdet2.data.region_boxes import AnnotationBoxes, BoxFilters, FileBoxes, FoundBoxes, apply_filters
from ovdet2.errors import DataError


def found(boxes, scores=None, ids=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.ones(len(boxes)) if scores is None else torch.tensor(scores)
    return FoundBoxes(boxes, scores, torch.full((len(boxes),), -1) if ids is None else torch.tensor(ids))


numbers = st.floats(-30, 150, allow_nan=False, width=32)
filters = st.builds(
    BoxFilters,
    min_score=st.none() | st.floats(0, 1),
    min_side=st.none() | st.floats(0, 40),
    nms=st.none() | st.floats(0.1, 1),
    top=st.none() | st.integers(1, 5),
)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers, st.floats(0, 1, width=32)), max_size=12), filters)
@settings(max_examples=100, deadline=None)
def test_what_the_filters_leave(rows, chosen):
    """Each promise of BoxFilters, against the boxes that come out; and a box that keeps all promises is not lost."""
    before = found([r[:4] for r in rows], [r[4] for r in rows], list(range(len(rows))))
    after = apply_filters(before, chosen, 80, 120)
    boxes = after.boxes_xyxy
    assert (boxes >= 0).all() and (boxes <= torch.tensor([120.0, 80, 120, 80])).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (sides > 0).all()
    if chosen.min_side is not None:
        assert (sides >= chosen.min_side).all()
    if chosen.min_score is not None:
        assert (after.scores >= chosen.min_score).all()
    if chosen.nms is not None:
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert (overlap <= chosen.nms + 1e-6).all()
    if chosen.top is not None:
        assert len(after) <= chosen.top
    for row, ann_id in enumerate(after.ann_ids.tolist()):  # rows stay together
        assert after.scores[row] == before.scores[ann_id]
    if chosen == BoxFilters():
        inside = apply_filters(before, BoxFilters(), 80, 120)
        assert inside.ann_ids.tolist() == sorted(inside.ann_ids.tolist())


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
    assert source.image_ids() == [2, 9] and len(source({"image_id": 3})) == 0
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
        ("b.pkl", pickle.dumps({"ids": [1], "boxes": [Malicious()]}), "asks for builtins.print"),
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
