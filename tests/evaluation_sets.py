"""Small data sets with detections for the tests of the evaluation, and what reference implementations make of them."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_api
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import register_dataset
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.evaluation.columns import Detections, Truth

SHARED = Path(__file__).parents[2] / "shared" / "data"
SIDE = 200  # height and width of all images

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
            {"id": int(image_id), "file_name": f"{image_id}.jpg", "width": SIDE, "height": SIDE}
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


def with_masks(data, detections, seed=0):
    """The same with an ellipse in each box: polygons, some of two parts, run-length codes for crowds and detections."""
    random = np.random.default_rng(seed)
    for annotation in data["annotations"]:
        polygon = _ellipse(annotation["bbox"])
        annotation["segmentation"] = [polygon]
        if annotation["iscrowd"]:
            code = mask_api.frPyObjects([polygon], SIDE, SIDE)[0]
            annotation["segmentation"] = {"size": [SIDE, SIDE], "counts": code["counts"].decode("ascii")}
        elif random.random() < 0.3:
            annotation["segmentation"].append(_ellipse(random.integers(5, 90, 4)))
        annotation["area"] = float(random.integers(100, 12000))  # not that of the box: COCO goes by this number
    for detection in detections:
        code = mask_api.frPyObjects([_ellipse(detection["bbox"])], SIDE, SIDE)[0]
        detection["segmentation"] = {"size": [SIDE, SIDE], "counts": code["counts"].decode("ascii")}
    return data, detections


def _ellipse(box):
    angles = np.linspace(0, 2 * np.pi, 9)[:-1]
    x, y, width, height = box
    points = np.stack([x + width * (1 + np.cos(angles)) / 2, y + height * (1 + np.sin(angles)) / 2], axis=1)
    return np.round(points.clip(0, SIDE), 2).flatten().tolist()


def columns_of(data, detections):
    """(:class:`Truth`, :class:`Detections`) of a json and of result dicts, in double precision."""
    annotations, images = data["annotations"], sorted(data["images"], key=lambda image: image["id"])

    def column(records, key, dtype):
        return np.array([record[key] for record in records], dtype=dtype)

    truth = Truth(
        images={image["id"]: image for image in images},
        ann_ids=column(annotations, "id", np.int64),
        image_ids=column(annotations, "image_id", np.int64),
        category_ids=column(annotations, "category_id", np.int64),
        boxes_xyxy=xyxy(column(annotations, "bbox", np.float64)),
        areas=column(annotations, "area", np.float64),
        crowd=np.array([annotation.get("iscrowd", 0) for annotation in annotations], dtype=bool),
        segmentations=[annotation.get("segmentation") for annotation in annotations],
    )
    found = Detections(
        image_ids=column(detections, "image_id", np.int64),
        category_ids=column(detections, "category_id", np.int64),
        scores=column(detections, "score", np.float64),
        boxes_xyxy=xyxy([detection.get("bbox", (0, 0, 0, 0)) for detection in detections]),
        masks=[detection.get("segmentation") for detection in detections],
    )
    return truth, found


def pycocotools_per_class(data, detections, category_ids, task="bbox"):
    """{category id: {"AP": percent, "AP50", "AP75", "APs", "APm", "APl", "AR@100"}} from the reference."""
    detections = json.loads(json.dumps(detections))
    for detection in detections:
        detection.pop("segmentation" if task == "bbox" else "bbox", None)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(data))
        truth.createIndex()
        engine = COCOeval(truth, truth.loadRes(detections), task)
        engine.params.catIds = list(category_ids)
        engine.evaluate()
        engine.accumulate()
    precision, recall = engine.eval["precision"][..., -1], engine.eval["recall"][..., -1]
    figures = {}
    for k, category_id in enumerate(sorted(category_ids)):
        values = {
            "AP": precision[:, :, k, 0],
            "AP50": precision[0, :, k, 0],
            "AP75": precision[5, :, k, 0],
            "APs": precision[:, :, k, 1],
            "APm": precision[:, :, k, 2],
            "APl": precision[:, :, k, 3],
            "AR@100": recall[:, k, 0],
        }
        figures[category_id] = {
            name: 100 * value.mean() if (value > -1).all() else math.nan for name, value in values.items()
        }
    return figures


def xyxy(boxes):
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def instances(detections, split=SPLIT):
    """Detections of one image as the model gives them."""
    result = Instances((SIDE, SIDE))
    result.pred_boxes = Boxes(torch.tensor(xyxy([detection["bbox"] for detection in detections])).float())
    result.scores = torch.tensor([detection["score"] for detection in detections]).float()
    position = split.id_to_contiguous
    if any("segmentation" in detection for detection in detections):
        masks = [mask_api.decode(detection["segmentation"]) for detection in detections]
        result.pred_masks = torch.tensor(np.stack(masks)).bool()
    result.pred_classes = torch.tensor([position[detection["category_id"]] for detection in detections]).long()
    return result


def proposals(boxes, logits=None):
    result = Instances((SIDE, SIDE))
    result.proposal_boxes = Boxes(torch.as_tensor(np.asarray(boxes), dtype=torch.float32).reshape(-1, 4))
    result.objectness_logits = torch.arange(len(result.proposal_boxes), 0, -1).float() if logits is None else logits
    return result


def feed(evaluator, data, detections, image_ids=None, proposals_of=None, split=SPLIT, layers=()):
    """Give an evaluator the detections of images; ``layers`` are those of decoder layers, lists like ``detections``."""
    for image_id in [image["id"] for image in data["images"]] if image_ids is None else image_ids:

        def of_image(records):
            return instances([found for found in records if found["image_id"] == image_id], split)

        output = {"instances": of_image(detections)}
        if layers:
            output["decoder_layers"] = [of_image(records) for records in layers]
        if proposals_of is not None:
            output["proposals"] = proposals_of(image_id)
        evaluator.process([{"image_id": image_id}], [output])


def evaluate_in_group(path, folder):
    """In each process of a group: evaluate every n-th image of the json ``path``, with masks, proposals and layers."""
    data = json.loads(Path(path).read_text())
    detections = with_masks(*random_set(11))[1]
    rank, processes = comm.get_rank(), comm.get_world_size()
    name = f"test_group_{Path(folder).name}"
    register_dataset(name, path, Path(path).parent, SPLIT, masks=True)
    evaluator = OpenVocabularyEvaluator(name, folder, decoder_layers=3)
    evaluator.reset()
    share = [image["id"] for image in data["images"]][rank::processes]
    random = np.random.default_rng(11)
    boxes = {image["id"]: xyxy(random.uniform(1, 90, (40, 4))) for image in data["images"]}
    layers = [detections[::4], detections[::2]]
    feed(evaluator, data, detections, share, lambda image_id: proposals(boxes[image_id]), layers=layers)
    evaluator.evaluate()
