"""The boxes of an image that a region cache holds: annotations, proposals, or boxes of a file; and their filters.

Shapes: R boxes of an image. Boxes are XYXY in pixels of the original image.
Names: ``_logits`` before softmax or sigmoid, ``_xyxy`` boxes (left, top, right, bottom).
"""

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torchvision.ops import nms

from ovdet2.errors import DataError
from ovdet2.io.array_pickle import DamagedPickle, read_array_pickle
from ovdet2.io.files import read_json, sha256_file


@dataclass(frozen=True)
class BoxFilters:
    """Filters of the boxes of an image, applied in this order; None skips a filter.

    Attributes:
        min_score: minimum score.
        min_side: minimum width *and* minimum height in pixels, after clipping to the image.
        nms: IoU threshold of class-agnostic NMS.
        top: maximum number of boxes; the highest scores stay.
    """

    min_score: float | None = None
    min_side: float | None = None
    nms: float | None = None
    top: int | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain dict for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class ImageBoxes:
    """Boxes of one image.

    Attributes:
        boxes_xyxy: Tensor [R, 4] float32, pixels of the original image.
        scores: Tensor [R] float32, in [0, 1].
        ann_ids: Tensor [R] int64, annotation id of each box, -1 for a box that is no annotation.
    """

    boxes_xyxy: torch.Tensor
    scores: torch.Tensor
    ann_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def __getitem__(self, rows: torch.Tensor | slice) -> "ImageBoxes":
        return ImageBoxes(self.boxes_xyxy[rows], self.scores[rows], self.ann_ids[rows])


FoundBoxes = ImageBoxes  # former name
NO_BOXES = ImageBoxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def apply_filters(boxes: ImageBoxes, filters: BoxFilters, height: int, width: int) -> ImageBoxes:
    """Clip boxes to the image, and drop those outside of it or below a filter.

    The order is kept, except that ``nms`` and ``top`` sort by descending score.

    Args:
        boxes: :class:`ImageBoxes`.
        filters: :class:`BoxFilters`.
        height, width: of the image, in pixels.
    """
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    clipped = torch.minimum(boxes.boxes_xyxy.float().clamp(min=0), limits)
    sides = clipped[:, 2:] - clipped[:, :2]
    kept = (sides > 0).all(dim=1)  # false for NaN too
    if filters.min_side is not None:
        kept &= (sides >= filters.min_side).all(dim=1)
    if filters.min_score is not None:
        kept &= boxes.scores >= filters.min_score
    boxes = ImageBoxes(clipped, boxes.scores.float(), boxes.ann_ids)[kept]
    if filters.nms is not None:
        boxes = boxes[nms(boxes.boxes_xyxy, boxes.scores, filters.nms)]
    if filters.top is not None and len(boxes) > filters.top:
        best = torch.sort(boxes.scores, descending=True, stable=True).indices
        boxes = boxes[best[: filters.top]]
    return boxes


class BoxSource(Protocol):
    """A callable that returns the boxes of a record, and describes itself for the manifest."""

    def recipe(self) -> dict[str, Any]:
        """JSON-serialisable dict that identifies the source, for the manifest."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> ImageBoxes:
        """Boxes of a Detectron2 record; a source with a method ``prepare`` also gets its result for the image."""
        ...


class AnnotationBoxes:
    """The annotated boxes of a record with their annotation ids; crowds, which contain many objects, are skipped."""

    def recipe(self) -> dict[str, Any]:
        """JSON-serialisable dict that identifies the source, for the manifest."""
        return {"source": "annotations"}

    def __call__(self, record: Mapping[str, Any]) -> ImageBoxes:
        """:class:`ImageBoxes` of a Detectron2 record, scores 1.

        Raises:
            DataError: an annotation without id.
        """
        annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        if any("id" not in a for a in annotations):
            raise DataError(
                f"image id {record['image_id']} has an annotation without id, but cached regions are looked up by "
                "annotation id: give each an id (ovdet2 dataset check)."
            )
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ids = torch.tensor([a["id"] for a in annotations], dtype=torch.int64)
        return ImageBoxes(boxes, torch.ones(len(boxes)), ids)


class FileBoxes:
    """Boxes of a file: a COCO-results json, or a proposal file of Detectron2 (.pkl, arrays only)."""

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: ``.json``: list of {"image_id", "bbox" [x, y, w, h], "score"}; ``.pkl``: {"ids" (or "indexes"),
                "boxes", "objectness_logits" (or "scores"), "bbox_mode"}, a list entry for each image.

        Raises:
            DataError: another format; or a pickle that holds more than arrays.
        """
        self.path = Path(path)
        read = {".json": _results, ".pkl": _proposal_file}.get(self.path.suffix)
        if read is None:
            raise DataError(f"{path} is neither a COCO-results .json nor a proposal file .pkl of Detectron2.")
        self._image_ids, self._offsets, self._boxes, self._scores = read(self.path)

    def recipe(self) -> dict[str, Any]:
        """JSON-serialisable dict that identifies the source, for the manifest."""
        return {"source": "file", "file_sha256": sha256_file(self.path)}

    def require_images(self, image_ids: Iterable[int]) -> int:
        """Number of the images for which the file has boxes.

        Raises:
            DataError: it has boxes for none of them, so it is of another data set.
        """
        count = int(np.isin(self._image_ids, list(image_ids)).sum())
        if not count:
            raise DataError(
                f"{self.path} has boxes for {len(self._image_ids)} images (ids {self._image_ids[:3].tolist()}, ...), "
                "none of which is in the data set: give a file of boxes for this data set."
            )
        return count

    def __call__(self, record: Mapping[str, Any]) -> ImageBoxes:
        """:class:`ImageBoxes` of a Detectron2 record; empty for an image that is not in the file."""
        place = bisect.bisect_left(self._image_ids, record["image_id"])
        if place == len(self._image_ids) or self._image_ids[place] != record["image_id"]:
            return NO_BOXES
        rows = slice(self._offsets[place], self._offsets[place + 1])
        boxes = torch.from_numpy(self._boxes[rows].copy())
        return ImageBoxes(boxes, torch.from_numpy(self._scores[rows].copy()), torch.full((len(boxes),), -1))


def _results(path):
    """Read a COCO-results json, grouped by image; within an image in file order."""
    entries = read_json(path, "give a COCO-results file")
    try:
        image_ids = np.array([entry["image_id"] for entry in entries], dtype=np.int64)
        boxes = np.array([entry["bbox"] for entry in entries], dtype=np.float32).reshape(-1, 4)
        scores = np.array([entry["score"] for entry in entries], dtype=np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no COCO-results file ({type(error).__name__}: {error}): "
            "it is a list of image_id, bbox and score."
        ) from None
    boxes[:, 2:] += boxes[:, :2]
    return _grouped(image_ids, boxes, scores, path)


def _proposal_file(path):
    """Read a proposal file of Detectron2 (see its load_proposals_into_dataset) without running code from it."""
    try:
        data = read_array_pickle(path)
        ids = data["ids"] if "ids" in data else data["indexes"]
        per_image = data["scores"] if "scores" in data else data["objectness_logits"]
        boxes = [np.asarray(b, dtype=np.float32).reshape(-1, 4) for b in data["boxes"]]
        scores = [np.asarray(s, dtype=np.float32).reshape(-1) for s in per_image]
        image_ids = np.repeat(np.array([int(i) for i in ids], dtype=np.int64), [len(b) for b in boxes])
        boxes, scores = np.concatenate(boxes or [np.zeros((0, 4), np.float32)]), np.concatenate(scores or [[]])
        mode = int(data.get("bbox_mode", 0))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, DataError) and not isinstance(error, DamagedPickle):
            raise
        raise DataError(
            f"{path} is no proposal file of Detectron2 ({type(error).__name__}: {error}): it is a dict of ids, boxes, "
            "objectness_logits and bbox_mode."
        ) from None
    if mode not in (0, 1):
        raise DataError(f"{path} has boxes of bbox_mode {mode}: convert them to BoxMode.XYXY_ABS (0).")
    if mode == 1:
        boxes[:, 2:] += boxes[:, :2]
    if len(scores) and (scores.min() < 0 or scores.max() > 1):
        scores = 1 / (1 + np.exp(-scores.astype(np.float64)))  # logits
    return _grouped(image_ids, boxes, scores.astype(np.float32), path)


def _grouped(image_ids, boxes, scores, path):
    """(unique image ids, offsets, boxes, scores) with the rows of an image together, otherwise in file order."""
    if not len(image_ids) == len(boxes) == len(scores):
        raise DataError(f"{path} has {len(boxes)} boxes but {len(scores)} scores for {len(image_ids)} image entries.")
    if len(scores) and not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1):
        raise DataError(f"{path} has scores outside [0, 1]: write probabilities.")
    order = np.argsort(image_ids, kind="stable")
    unique, counts = np.unique(image_ids, return_counts=True)
    return unique, np.concatenate([[0], counts.cumsum()]), boxes[order], scores[order]
