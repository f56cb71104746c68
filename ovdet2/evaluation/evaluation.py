"""A finished evaluation: ground truth, detections and figures; and how it is read from its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import split_of
from ovdet2.errors import DataError, UsageError
from ovdet2.evaluation.bootstrap import bootstrap
from ovdet2.evaluation.coco_ap import evaluate_classes
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.federation import Federation
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.evaluation.predictions import read_predictions
from ovdet2.evaluation.report import class_subsets, figure_names
from ovdet2.io.files import read_json, sha256_file

REPORT = "report.json"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        truth: :class:`~ovdet2.evaluation.columns.Truth`.
        detections: :class:`~ovdet2.evaluation.columns.Detections`, without those of distractor words.
        report: dict of :func:`~ovdet2.evaluation.report.build_report`.
    """

    truth: Truth
    detections: Detections
    report: dict


def load_evaluation(folder: str | Path, dataset_name: str) -> Evaluation:
    """Read the files that :meth:`~ovdet2.evaluation.OpenVocabularyEvaluator.evaluate` wrote into a folder.

    Args:
        folder: holds report.json and predictions.jsonl.
        dataset_name: the data set it was made on.

    Returns:
        :class:`Evaluation`.

    Raises:
        UsageError: the data set has no base / novel split, or the folder is of another data set.
        DataError: a file is missing or damaged, or the data set's json is another than at the time of the evaluation.
    """
    folder = Path(folder)
    remedy = f"evaluate {dataset_name} again, writing to this folder"
    report = read_json(folder / REPORT, remedy)
    if report.get("dataset") != dataset_name:
        raise UsageError(f"{folder} holds an evaluation on {report.get('dataset')!r}, not on {dataset_name!r}.")
    if not (folder / MERGED).is_file():
        raise DataError(f"{folder / MERGED} does not exist: {remedy}.")
    truth, _ = load_truth(dataset_name)
    json_file = MetadataCatalog.get(dataset_name).json_file
    if sha256_file(json_file) != report["json_sha256"]:
        raise DataError(f"{json_file} is not the file that {folder} was evaluated on: {remedy}.")
    return Evaluation(truth, read_predictions(folder / MERGED).detections, report)


def load_truth(dataset_name: str) -> tuple[Truth, Split]:
    """(:class:`~ovdet2.evaluation.columns.Truth`, :class:`~ovdet2.data.datasets.coco_json.Split`) of a data set.

    Raises:
        UsageError: it has no base / novel split.
        DataError: its json is missing or damaged.
    """
    split = split_of(dataset_name)
    if split is None:
        raise UsageError(f"data set {dataset_name!r} has no base / novel split: use register_ov_dataset.")
    records = DatasetCatalog.get(dataset_name)
    return Truth.of(records, split, masks=MetadataCatalog.get(dataset_name).ov_masks), split


def measure(
    truth: Truth, detections: Detections, split: Split, metric: str, limit: int
) -> dict[str, dict[int, dict[str, float]]]:
    """Figures of each class, for boxes and, where both sides have them, for masks.

    Args:
        truth, detections: of one data set.
        split: its :class:`~ovdet2.data.datasets.coco_json.Split`.
        metric: "ov_coco", "ov_voc" or "ov_lvis"; the last one by the federated rules.
        limit: detections per image that ``detections`` was cut to.

    Returns:
        {"bbox": {category id: {figure: percent}}, "segm": the same}, see
        :func:`~ovdet2.evaluation.coco_ap.evaluate_classes`; "segm" only with masks.
    """
    federation = Federation(truth.images) if metric == "ov_lvis" else None
    tasks = ["bbox"] if truth.segmentations is None or detections.masks is None else ["bbox", "segm"]
    ids, crowds = split.category_ids, metric != "ov_voc"
    return {task: evaluate_classes(truth, detections, ids, task, (limit,), federation, crowds) for task in tasks}


def resampled(
    truth: Truth, detections: Detections, split: Split, metric: str, limit: int, resamples: int
) -> dict[str, Any]:
    """AP50 and, by other rules than VOC's, AP of boxes on resampled images: see
    :func:`~ovdet2.evaluation.bootstrap.bootstrap`. Arguments as of :func:`measure`."""
    names = [name for name in figure_names(metric, limit) if name in ("AP50", "AP")]
    federation = Federation(truth.images) if metric == "ov_lvis" else None
    crowds = metric != "ov_voc"
    return bootstrap(truth, detections, split, names, class_subsets(split), federation, crowds, resamples)


def objects_per_class(truth: Truth, split: Split) -> dict[int, int]:
    """{category id: annotations that are not crowd}."""
    ids, counts = np.unique(truth.category_ids[~truth.crowd], return_counts=True)
    return dict.fromkeys(split.category_ids, 0) | dict(zip(ids.tolist(), counts.tolist()))
