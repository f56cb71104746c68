"""Evaluation of an open-vocabulary detector on base, novel and all classes.

Shapes: N images, R detections of an image, P proposals of an image, G ground-truth boxes.
"""

import importlib.metadata
import logging
import time
from collections import OrderedDict
from pathlib import Path

import detectron2.utils.comm as comm
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ovdet2.data.datasets.register import split_of
from ovdet2.errors import DataError, NumericalError, UsageError
from ovdet2.evaluation.coco_ap import class_average_precision
from ovdet2.evaluation.prediction_files import PredictionWriter, merge, read_merged
from ovdet2.evaluation.proposal_recall import average_recall, covered_iou
from ovdet2.evaluation.report import SUBSETS, build_report, format_table, to_results
from ovdet2.files import sha256_file, write_json

PROPOSAL_LIMITS = (100, 300)

logger = logging.getLogger(__name__)


class OpenVocabularyEvaluator(DatasetEvaluator):
    """COCO box AP split by base and novel classes, and recall of proposals split the same way.

    One run predicts over base and novel names together ("generalized"). Predictions go to disk image by image;
    the first process merges and evaluates them, the others return {}.

    Args:
        dataset_name: a data set of ``register_ov_dataset``.
        output_dir: receives predictions.jsonl and report.json; with several machines, on a file system they share.
        max_detections: detections kept per image, by score, before anything else.

    Raises:
        UsageError: the data set has no base / novel split.
        DataError: the data set is missing or damaged.
    """

    def __init__(self, dataset_name, output_dir, max_detections=100):
        metadata = MetadataCatalog.get(dataset_name)
        self._split = split_of(dataset_name)
        if self._split is None:
            raise UsageError(f"data set {dataset_name!r} has no base / novel split: use register_ov_dataset.")
        self._dataset_name, self._output_dir, self._max_detections = dataset_name, Path(output_dir), max_detections
        records = DatasetCatalog.get(dataset_name)
        self._json_file = Path(metadata.json_file)
        self._truth = {record["image_id"]: _truth_of(record) for record in records}
        self._writer = None

    def reset(self):
        """Start a new evaluation, dropping what an unfinished one has written."""
        if self._writer is not None:
            self._writer.close()
        self._writer = PredictionWriter(self._output_dir, comm.get_rank())
        self._started = time.perf_counter()

    def process(self, inputs, outputs):
        """Write the predictions of some images.

        Args:
            inputs: list of dicts with "image_id".
            outputs: list of dicts with "instances" (pred_boxes XYXY in pixels of the original image, scores,
                pred_classes contiguous and base first) and, in all or in no image, "proposals" (proposal_boxes,
                objectness_logits).

        Raises:
            NumericalError: a box or score that is not finite.
            DataError: an image that is not in the data set, or a class beyond its vocabulary.
        """
        for image, output in zip(inputs, outputs):
            image_id = image["image_id"]
            if image_id not in self._truth:
                raise DataError(f"image {image_id} is not in {self._dataset_name}: evaluate with its own loader.")
            record = {"image_id": image_id, **self._detections(image_id, output["instances"])}
            if "proposals" in output:
                record["covered"] = self._covered(image_id, output["proposals"])
            self._writer.write(record)

    def evaluate(self):
        """Merge, evaluate, print the table and write report.json.

        Returns:
            OrderedDict {"bbox": {"AP50-novel": percent, ...}, "proposals": {"AR@100-novel": percent, ...}} on the
            first process, {} on the others. "proposals" is absent when the model gives none.

        Raises:
            DataError: on every process, when an image is missing, was predicted twice, or a file is missing.
        """
        self._writer.close()
        tokens = comm.gather(self._writer.token)  # also waits until every process has closed its file
        merged, problem = None, None
        if comm.is_main_process():
            try:
                merged = merge(self._output_dir, tokens, self._truth)
            except DataError as error:
                problem = str(error)
        problem = next((text for text in comm.all_gather(problem) if text), None)
        if problem:
            raise DataError(problem)
        if merged is None:
            return OrderedDict()
        report = self._report(merged)
        write_json(self._output_dir / "report.json", report, indent=1)
        logger.info("\n%s", format_table(report))
        return to_results(report)

    def _detections(self, image_id, instances):
        boxes = _array(instances.pred_boxes.tensor)  # R x 4
        scores, classes = _array(instances.scores), _array(instances.pred_classes)
        _require_finite(image_id, "detection", boxes, scores)
        class_count = len(self._split.names)
        beyond = classes[(classes < 0) | (classes >= class_count)]
        if beyond.size:
            raise DataError(
                f"image {image_id} has a detection of class {beyond[0]}, but {self._dataset_name} has the "
                f"{class_count} classes 0 to {class_count - 1}: test with the data set's vocabulary."
            )
        best = np.argsort(-scores, kind="stable")[: self._max_detections]
        category_ids = np.asarray(self._split.category_ids)[classes[best].astype(int)]
        return {
            "category_ids": category_ids.tolist(),
            "scores": scores[best].tolist(),
            "boxes_xyxy": boxes[best].tolist(),
        }

    def _covered(self, image_id, proposals):
        """IoU with which the best proposals cover this image's boxes: {"AR@100-novel": [G] list, ...}."""
        boxes, logits = _array(proposals.proposal_boxes.tensor), _array(proposals.objectness_logits)
        _require_finite(image_id, "proposal", boxes, logits)
        boxes = boxes[np.argsort(-logits, kind="stable")]
        gt_boxes, gt_classes, crowd = self._truth[image_id]
        is_base = gt_classes < len(self._split.base)
        covered = {}
        for subset, wanted in zip(SUBSETS, (~is_base, is_base, np.ones_like(is_base))):
            for limit in PROPOSAL_LIMITS:
                covered[f"AR@{limit}-{subset}"] = covered_iou(gt_boxes[wanted & ~crowd], boxes[:limit]).tolist()
        return covered

    def _report(self, merged):
        detections, recall = _load(merged)
        truth_image_ids = np.repeat(list(self._truth), [len(boxes) for boxes, _, _ in self._truth.values()])
        gt_boxes, gt_classes, crowd = (np.concatenate(parts) for parts in zip(*self._truth.values()))
        per_class, boxes_per_class = {}, {}
        for position, category_id in enumerate(self._split.category_ids):
            of_truth = gt_classes == position
            found = detections["category_ids"] == category_id
            boxes_per_class[category_id] = int((of_truth & ~crowd).sum())
            per_class[category_id] = class_average_precision(
                truth_image_ids[of_truth],
                gt_boxes[of_truth],
                crowd[of_truth],
                detections["image_ids"][found],
                detections["boxes_xyxy"][found],
                detections["scores"][found],
                self._max_detections,
            )
        facts = {
            "dataset": self._dataset_name,
            "json_sha256": sha256_file(self._json_file),
            "images": len(self._truth),
            "detections": len(detections["scores"]),
            "detections_per_image": self._max_detections,
            "processes": comm.get_world_size(),
            "seconds": round(time.perf_counter() - self._started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {name: _version(name) for name in ("ovdet2", "torch", "faster-coco-eval")},
        }
        return build_report(self._split, per_class, boxes_per_class, recall, facts)


def _truth_of(record):
    """(boxes [G, 4] XYXY float64, contiguous classes [G], crowd [G] bool) of a dataset dict."""
    annotations = record["annotations"]
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    classes = np.array([annotation["category_id"] for annotation in annotations], dtype=np.int64)
    crowd = np.array([annotation["iscrowd"] for annotation in annotations], dtype=bool)
    return boxes, classes, crowd


def _load(merged):
    """Compact arrays of all detections, those of an image together and by falling score, and the recall figures.

    Returns:
        ({"image_ids" [R] i64, "category_ids" [R] i32, "scores" [R] f32, "boxes_xyxy" [R, 4] f32},
        {"AR@100-novel": percent, ...})
    """
    parts, covered, with_proposals, images = [], {}, 0, 0
    for record in read_merged(merged):
        images += 1
        parts.append(
            (
                np.full(len(record["scores"]), record["image_id"], dtype=np.int64),
                np.array(record["category_ids"], dtype=np.int32),
                np.array(record["scores"], dtype=np.float32),
                np.array(record["boxes_xyxy"], dtype=np.float32).reshape(-1, 4),
            )
        )
        with_proposals += "covered" in record
        for key, values in record.get("covered", {}).items():
            covered.setdefault(key, []).append(np.asarray(values, dtype=np.float64))
    if with_proposals not in (0, images):
        raise DataError(f"{with_proposals} of {images} images have proposals: give them for all images or for none.")
    columns = (np.concatenate(column) for column in zip(*parts))
    recall = {key: average_recall(np.concatenate(values)) for key, values in covered.items()}
    return dict(zip(("image_ids", "category_ids", "scores", "boxes_xyxy"), columns)), recall


def _array(tensor):
    """Tensor on any device to numpy: float64 for floats (float16 and bfloat16 included), int64 for integers."""
    tensor = tensor.detach().cpu()
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.long().numpy()


def _require_finite(image_id, kind, boxes, scores):
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise NumericalError(
            f"image {image_id} has a {kind} whose box or score is not finite: the weights are damaged or the "
            "training has diverged; evaluate an earlier checkpoint."
        )


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
