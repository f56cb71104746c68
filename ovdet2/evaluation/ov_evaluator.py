"""Evaluation of an open-vocabulary detector on base, novel and all classes.

Shapes: N images, R detections of an image, P proposals of an image, G ground-truth boxes, H x W pixels.
Names: ``pred_`` predicted, ``gt_`` ground truth, ``_logits`` before softmax or sigmoid,
``_xyxy`` boxes (left, top, right, bottom).
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ovdet2.errors import DataError, NumericalError, UsageError
from ovdet2.evaluation.absent_words import absent_detections, absent_words
from ovdet2.evaluation.bootstrap import LARGE, RESAMPLES
from ovdet2.evaluation.evaluation import REPORT, Evaluation, load_truth, measure, objects_per_class, resampled
from ovdet2.evaluation.precision_recall import PRECISION_RECALL, WITHOUT_AP, precision_and_recall
from ovdet2.evaluation.prediction_files import MERGED, PredictionWriter, merge, read_merged
from ovdet2.evaluation.predictions import read_predictions
from ovdet2.evaluation.proposal_recall import covered_iou
from ovdet2.evaluation.provenance import provenance
from ovdet2.evaluation.report import build_report, format_table, to_results
from ovdet2.evaluation.setting import Setting
from ovdet2.io.files import sha256_file, write_json
from ovdet2.io.masks import run_length_code

PROPOSAL_LIMITS = (100, 300, 1000)
DETECTION_LIMITS = {"ov_coco": 100, "ov_voc": 100, "ov_lvis": 300}
_LAYER = "decoder_layer_"  # folders, numbered from 1

logger = logging.getLogger(__name__)


class OpenVocabularyEvaluator(DatasetEvaluator):
    """AP of boxes and masks split by base and novel classes, and recall of proposals split the same way.

    The rules are those of the data set's metric (``evaluator_type`` in its metadata): COCO, LVIS or VOC. One run
    predicts over base and novel names together ("generalized"). Predictions go to disk image by image; the first
    process merges and evaluates them, the others return {}.

    Args:
        dataset_name: a data set of ``register_ov_dataset``.
        output_dir: receives predictions.jsonl and report.json; with several machines, on a file system they share.
        max_detections: detections kept per image, by score, before anything else; None for the metric's own number
            (:data:`DETECTION_LIMITS`).
        proposals_per_image: the largest number of proposals of an image that the model gives; recall is reported at the
            numbers of :data:`PROPOSAL_LIMITS` up to it.
        distractors: names in the vocabulary after the data set's K; their classes K, K + 1, ... have no annotations.
            Their detections compete for the places among an image's best, and are then counted and ignored in AP.
        facts: further entries of report.json, such as the vocabulary's fingerprint; JSON-serialisable.
        decoder_layers: number of decoder layers, for a detector that gives the detections of every layer; else 0. The
            predictions of those before the last go to separate folders, ``decoder_layer_01`` and so on, the figures
            of all into "decoder_layers" of the report.
        resamples: of the images, for the intervals of AP and AP50 ("bootstrap" of the report, see
            :mod:`~ovdet2.evaluation.bootstrap`); 0: none. Large data sets have none, see :meth:`measure_again`.
        scores_tell_nothing: why the scores do not order the detections; the report then has precision and recall
            instead of AP. "": they do.

    After :meth:`evaluate`, the first process has ``evaluation``, an
    :class:`~ovdet2.evaluation.evaluation.Evaluation`; it is None before, and on the others.

    Raises:
        UsageError: the data set has no base / novel split.
        DataError: the data set is missing or damaged.
    """

    def __init__(
        self,
        dataset_name,
        output_dir,
        max_detections=None,
        proposals_per_image=300,
        distractors=(),
        facts=None,
        decoder_layers=0,
        resamples=RESAMPLES,
        scores_tell_nothing="",
    ):
        self._truth, self._split = load_truth(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        self._metric, self._json_file = metadata.evaluator_type, Path(metadata.json_file)
        self._dataset_name, self._output_dir = dataset_name, Path(output_dir)
        self._max_detections = DETECTION_LIMITS[self._metric] if max_detections is None else max_detections
        self._proposal_limits = [limit for limit in PROPOSAL_LIMITS if limit <= proposals_per_image]
        self._distractors, self._facts = tuple(distractors), dict(facts or {})
        self._layer_folders = [self._output_dir / f"{_LAYER}{number:02d}" for number in range(1, decoder_layers)]
        self._scores_tell_nothing = scores_tell_nothing
        self._resamples, self._on_request = resamples, False
        self._writer: PredictionWriter | None = None
        self.evaluation: Evaluation | None = None
        self._layer_writers: list[PredictionWriter] = []

    def reset(self) -> None:
        """Start a new evaluation; remove the files of an unfinished one."""
        self._close()
        rank = comm.get_rank()
        self._writer, self.evaluation = PredictionWriter(self._output_dir, rank), None
        self._layer_writers = [PredictionWriter(folder, rank, self._writer.token) for folder in self._layer_folders]
        if comm.is_main_process():
            stale = [self._output_dir / name for name in (REPORT, "report.html")]
            for path in (*stale, *self._layer_files()):  # they would be read as files of the new predictions
                path.unlink(missing_ok=True)
        self._started = time.perf_counter()

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Write the predictions of some images.

        Args:
            inputs: list of dicts with "image_id".
            outputs: list of dicts with "instances" (pred_boxes XYXY in pixels of the original image, scores,
                pred_classes contiguous and base first, then distractors; for a data set with masks also, in all or in
                none of the images with detections, pred_masks [R, H, W] bool), in all or in no image "proposals"
                (proposal_boxes, objectness_logits) and, with TEST.DECODER_LAYERS, "decoder_layers", a list of
                "instances" for the layers before the last.

        Raises:
            NumericalError: a box or score that is not finite.
            DataError: an image that is not in the data set, a class beyond its vocabulary, masks of another size.
            UsageError: the model does not give as many decoder layers as were announced.
        """
        writer = self._open_writer()
        for image, output in zip(inputs, outputs):
            image_id = image["image_id"]
            if image_id not in self._truth.images:
                raise DataError(f"image {image_id} is not in {self._dataset_name}: evaluate with its own loader.")
            record = {"image_id": image_id, **self._detections(image_id, output["instances"])}
            if "proposals" in output and self._proposal_limits:
                record["covered"] = self._covered(image_id, output["proposals"])
            writer.write(record)
            self._write_layers(image_id, output.get("decoder_layers", ()))

    def process_records(self, records: Iterable[dict[str, Any]]) -> None:
        """Write predictions that are in the form of predictions.jsonl already.

        Args:
            records: dicts with "image_id", "category_ids", "scores", "boxes_xyxy", by descending score and cut to
                ``max_detections``; with masks also "mask_size" and "masks".
        """
        writer = self._open_writer()
        for record in records:
            writer.write(record)

    def evaluate(self) -> OrderedDict[str, OrderedDict[str, float]]:  # pyrefly: ignore[bad-override]  None in the base
        """Merge, evaluate, print the table and write report.json.

        Returns:
            OrderedDict {"bbox": {"AP50-novel": percent, ...}, "segm": likewise, "proposals": {"AR@100-novel": percent,
            ...}} on the first process, {} on the others. "segm" and "proposals" are absent when the model gives none.

        Raises:
            DataError: on every process, when an image is missing, was predicted twice, or a file is missing.
        """
        self._close()
        tokens = comm.gather(self._open_writer().token)  # also waits until every process has closed its file
        problem = None
        if comm.is_main_process():
            try:
                self.evaluation = self._finish(tokens)
            except DataError as error:
                problem = str(error)
        problem = next((text for text in comm.all_gather(problem) if text), None)
        if problem:
            raise DataError(problem)
        if self.evaluation is None:
            return OrderedDict()
        logger.info("\n%s", format_table(self.evaluation.report))
        return to_results(self.evaluation.report)

    def measure_again(self) -> Evaluation:
        """Measure the predictions.jsonl of an evaluation that stopped after its inference, and write report.json.

        Call it in one process. The intervals of AP are made for a large data set, too.

        Returns:
            :class:`~ovdet2.evaluation.evaluation.Evaluation`.

        Raises:
            DataError: the file does not exist, or its images are not those of this data set.
        """
        merged = self._output_dir / MERGED
        if not merged.is_file():
            raise DataError(f"{merged} does not exist: evaluate {self._dataset_name} first.")
        for path in (merged, *self._layer_files()):
            if {record["image_id"] for record in read_merged(path)} != set(self._truth.images):
                raise DataError(
                    f"{path} does not have the images of {self._dataset_name}: give the data set of the predictions."
                )
        self._started, self._on_request = time.perf_counter(), True
        return self._measure()

    def _close(self):
        for writer in (self._writer, *self._layer_writers):
            if writer is not None:
                writer.close()

    def _write_layers(self, image_id, layers):
        """Write the detections of the decoder layers before the last, each to its own file."""
        if self._layer_folders and len(layers) != len(self._layer_folders):
            raise UsageError(
                f"TEST.DECODER_LAYERS requires the detections of {len(self._layer_folders)} decoder layers before the "
                f"last, and the model gives {len(layers)}: switch it off for detectors without decoder layers."
            )
        for writer, instances in zip(self._layer_writers, layers):
            writer.write({"image_id": image_id, **self._detections(image_id, instances)})

    def _layer_files(self):
        """The merged predictions of the decoder layers before the last, the first layer's first."""
        return sorted(self._output_dir.glob(f"{_LAYER}*/{MERGED}"))

    def _finish(self, tokens):
        """Merge, measure and write; the first process's part of :meth:`evaluate`."""
        for folder in (self._output_dir, *self._layer_folders):
            merge(folder, tokens, self._truth.images)
        return self._measure()

    def _measure(self):
        predictions = read_predictions(self._output_dir / MERGED)
        report = self._report(predictions)
        write_json(self._output_dir / REPORT, report, indent=1)
        return Evaluation(self._truth, predictions.detections, report)

    def _open_writer(self) -> PredictionWriter:
        assert self._writer is not None  # reset() comes first, as DatasetEvaluator says
        return self._writer

    def _detections(self, image_id, instances):
        boxes = _array(instances.pred_boxes.tensor)  # R x 4
        scores, classes = _array(instances.scores), _array(instances.pred_classes)
        _require_finite(image_id, "detection", boxes, scores)
        class_count = len(self._split.names)
        known = class_count + len(self._distractors)
        beyond = classes[(classes < 0) | (classes >= known)]
        if beyond.size:
            raise DataError(
                f"image {image_id} has a detection of class {beyond[0]}, but {self._dataset_name} has the "
                f"{known} classes 0 to {known - 1}{', distractors included' if self._distractors else ''}: test with "
                "the data set's vocabulary."
            )
        best = np.argsort(-scores, kind="stable")[: self._max_detections]
        kept = best[classes[best] < class_count]
        record = {
            "category_ids": np.asarray(self._split.category_ids)[classes[kept].astype(int)].tolist(),
            "scores": scores[kept].tolist(),
            "boxes_xyxy": boxes[kept].tolist(),
        }
        if self._distractors:
            others = best[classes[best] >= class_count]
            record["distractor_detections"] = len(others)
            record["distractor_words"] = (classes[others] - class_count).tolist()
            record["distractor_scores"] = scores[others].tolist()
        if self._truth.segmentations is not None and instances.has("pred_masks"):
            record |= self._masks(image_id, instances.pred_masks, kept)
        return record

    def _masks(self, image_id, masks, kept):
        """{"mask_size": [H, W], "masks": counts of the run-length codes of the masks ``kept``, in that order}."""
        record = self._truth.images[image_id]
        size = [record["height"], record["width"]]
        if list(masks.shape[1:]) != size:
            raise DataError(
                f"image {image_id} has masks of {masks.shape[1]} x {masks.shape[2]} pixels, but is {size[0]} x "
                f"{size[1]}: give the loader's records of {self._dataset_name} to the model, whose post-processing "
                "takes the size from there."
            )
        # One at a time: 300 full-size masks in another memory order would be copies.
        return {
            "mask_size": size,
            "masks": [run_length_code(masks[row].cpu().numpy())["counts"] for row in kept.tolist()],
        }

    def _covered(self, image_id, proposals):
        """IoU with which the best proposals cover this image's boxes: {"AR@100-novel": [G] list, ...}."""
        boxes, logits = _array(proposals.proposal_boxes.tensor), _array(proposals.objectness_logits)
        _require_finite(image_id, "proposal", boxes, logits)
        boxes = boxes[np.argsort(-logits, kind="stable")]
        # The records go by image id.
        rows = slice(*(np.searchsorted(self._truth.image_ids, image_id, side) for side in ("left", "right")))
        gt_boxes, crowd = self._truth.boxes_xyxy[rows], self._truth.crowd[rows]
        base_ids = [category_id for category_id, _ in self._split.base]
        is_base = np.isin(self._truth.category_ids[rows], base_ids)
        subsets = {"novel": ~is_base, "base": is_base, "all": np.ones_like(is_base)}
        for subset, classes in (("novel", self._split.novel), ("base", self._split.base)):
            if not classes:
                del subsets[subset]
        covered = {}
        for subset, wanted in subsets.items():
            for limit in self._proposal_limits:
                covered[f"AR@{limit}-{subset}"] = covered_iou(gt_boxes[wanted & ~crowd], boxes[:limit]).tolist()
        return covered

    def _report(self, predictions):
        figures = self._figures(predictions.detections)
        layers = [self._figures(read_predictions(path).detections)["bbox"] for path in self._layer_files()]
        facts = {
            "dataset": self._dataset_name,
            "json_sha256": sha256_file(self._json_file),
            "images": len(self._truth.images),
            "detections": len(predictions.detections),
            "detections_per_image": self._max_detections,
            "distractors": list(self._distractors),
            "distractor_detections": predictions.distractor_detections,
            "setting": Setting().to_report(),
            "processes": comm.get_world_size(),
            "seconds": round(time.perf_counter() - self._started, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **provenance(),
            **self._facts,
        }
        objects = objects_per_class(self._truth, self._split)
        found = absent_detections(self._truth, predictions, self._split, self._distractors)
        if found is not None and self._truth.images and not self._scores_tell_nothing:
            facts["absent_words"] = absent_words(found, len(self._truth.images))
        names = None
        if self._scores_tell_nothing:
            names = PRECISION_RECALL
            facts |= {"metric": WITHOUT_AP, "scores_tell_nothing": self._scores_tell_nothing}
        report = build_report(self._split, self._metric, figures, objects, predictions.recall, facts, layers, names)
        if intervals := self._bootstrap(predictions.detections):
            report["bootstrap"] = intervals
        return report

    def _bootstrap(self, detections):
        """The entry "bootstrap" of the report; None without it."""
        if self._scores_tell_nothing or not self._resamples or (len(detections) > LARGE and not self._on_request):
            if self._resamples and not self._scores_tell_nothing:
                logger.info(
                    "%s detections: the intervals of AP are made by ovdet2 report make --bootstrap.",
                    f"{len(detections):,}",
                )
            return None
        return resampled(self._truth, detections, self._split, self._metric, self._max_detections, self._resamples)

    def _figures(self, detections):
        if self._scores_tell_nothing:
            return {"bbox": precision_and_recall(self._truth, detections, self._split, self._metric)}
        return measure(self._truth, detections, self._split, self._metric, self._max_detections)


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
