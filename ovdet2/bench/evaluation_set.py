"""A synthetic evaluation set: ground truth and predictions in any number, for benchmarks."""

import argparse
from pathlib import Path

import numpy as np

from ovdet2.evaluation.prediction_files import PredictionWriter, merge
from ovdet2.io.files import write_json

TRUTH = "truth.json"
_WIDTH, _HEIGHT = 640, 480
_OBJECTS = {"ov_coco": 7.3, "ov_lvis": 12.0}  # per image, as in COCO and LVIS


def write_set(folder: Path, metric: str, args: argparse.Namespace) -> None:
    """Write TRUTH and predictions.jsonl; a third of the detections are near an object, with better scores.

    Args:
        folder: where.
        metric: "ov_coco" or "ov_lvis", the rules that the set is made for.
        args: ``images``, ``classes``, ``detections`` per image, ``seed``, and ``skew``: class k is as frequent as 1 / k to
            this power.
    """
    random = np.random.default_rng(args.seed)
    shares = 1.0 / np.arange(1, args.classes + 1) ** args.skew
    shares /= shares.sum()
    images, annotations, writer = [], [], PredictionWriter(folder, 0)
    for image_id in range(1, args.images + 1):
        boxes, classes = _random_boxes(random, max(1, random.poisson(_OBJECTS[metric])), shares)
        image = {"id": image_id, "file_name": f"{image_id}.jpg", "width": _WIDTH, "height": _HEIGHT}
        if metric == "ov_lvis":
            absent = np.setdiff1d(random.integers(1, args.classes + 1, 8), classes)
            image |= {"neg_category_ids": absent.tolist(), "not_exhaustive_category_ids": classes[:1].tolist()}
        images.append(image)
        for box, category_id in zip(boxes, classes.tolist()):
            known = {"bbox": box.tolist(), "area": float(box[2] * box[3]), "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id, **known})
        writer.write({"image_id": image_id, **_random_detections(random, boxes, classes, shares, args.detections)})
    writer.close()
    merge(folder, [writer.token], range(1, args.images + 1))
    categories = [{"id": k, "name": f"class {k}", "frequency": "fcr"[k % 3]} for k in range(1, args.classes + 1)]
    write_json(folder / TRUTH, {"info": {}, "images": images, "annotations": annotations, "categories": categories})


def _random_boxes(random, count, shares):
    """(boxes XYWH [count, 4] within the image, classes [count] from 1)."""
    size = np.exp(random.uniform(np.log(8), np.log(300), (count, 2)))
    corner = random.uniform(0, 1, (count, 2)) * (np.array([_WIDTH, _HEIGHT]) - size)
    return np.concatenate([corner, size], axis=1).round(2), random.choice(len(shares), count, p=shares) + 1


def _random_detections(random, boxes, classes, shares, count):
    """A record's entries; float32 values, as a model gives them."""
    near = random.integers(0, len(boxes), count // 3)
    others, other_classes = _random_boxes(random, count - len(near), shares)
    moved = boxes[near] + random.normal(0, 0.07, (len(near), 4)) * np.tile(boxes[near, 2:], 2)
    found = np.concatenate([moved, others]).astype(np.float32)
    found[:, 2:] = found[:, :2] + found[:, 2:].clip(1)
    near_classes = np.where(random.random(len(near)) < 0.7, classes[near], random.permutation(classes[near]))
    scores = np.concatenate([random.beta(3, 3, len(near)), random.beta(1, 6, len(others))]).astype(np.float32)
    best = np.argsort(-scores, kind="stable")
    return {
        "category_ids": np.concatenate([near_classes, other_classes])[best].tolist(),
        "scores": scores[best].astype(float).tolist(),
        "boxes_xyxy": found[best].astype(float).tolist(),
    }
