"""Which boxes of an image a region cache holds: annotations, proposals, or those of a file; and their filters.

Shapes: R boxes of an image. Boxes are XYXY in pixels of the original image.
"""

import bisect
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torchvision.ops import nms

from ovdet2.errors import DataError
from ovdet2.io.array_pickle import ArraysOnly
from ovdet2.io.files import read_json, sha256_file


@dataclass(frozen=True)
class BoxFilters:
    """What is kept of the boxes of an image, in this order of steps; None leaves a step out.

    Attributes:
        min_score: lowest score.
        min_side: least width *and* least height in pixels, after clipping to the image.
        nms: IoU above which the lower score goes, whatever the class.
        top: boxes kept, by score.
    """

    min_score: float | None = None
    min_side: float | None = None
    nms: float | None = None
    top: int | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain dict for a manifest."""
        return asdict(self)


@dataclass(frozen=True)
class FoundBoxes:
    """Boxes of one image: ``boxes_xyxy`` Tensor [R, 4] float32, ``scores`` [R] float32 in [0, 1], ``ann_ids`` [R] int64
    (-1 where a box is no annotation)."""

    boxes_xyxy: torch.Tensor
    scores: torch.Tensor
    ann_ids: torch.Tensor

    def __len__(self) -> int:
        return len(self.boxes_xyxy)

    def __getitem__(self, rows: torch.Tensor | slice) -> "FoundBoxes":
        return FoundBoxes(self.boxes_xyxy[rows], self.scores[rows], self.ann_ids[rows])


NO_BOXES = FoundBoxes(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def apply_filters(found: FoundBoxes, filters: BoxFilters, height: int, width: int) -> FoundBoxes:
    """Boxes clipped to the image, without those of which nothing is left or that a filter drops.

    The order is kept, except that ``nms`` and ``top`` leave the best first.

    Args:
        found: :class:`FoundBoxes`.
        filters: :class:`BoxFilters`.
        height, width: of the image, in pixels.
    """
    limits = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = torch.minimum(found.boxes_xyxy.float().clamp(min=0), limits)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (sides > 0).all(dim=1)  # false for NaN, too
    if filters.min_side is not None:
        kept &= (sides >= filters.min_side).all(dim=1)
    if filters.min_score is not None:
        kept &= found.scores >= filters.min_score
    found = FoundBoxes(boxes, found.scores.float(), found.ann_ids)[kept]
    if filters.nms is not None:
        found = found[nms(found.boxes_xyxy, found.scores, filters.nms)]
    if filters.top is not None and len(found) > filters.top:
        best = torch.sort(found.scores, descending=True, stable=True).indices
        found = found[best[: filters.top]]
    return found


class BoxSource(Protocol):
    """Boxes of a record, and what the manifest says of where they come from."""

    def recipe(self) -> dict[str, Any]:
        """What the manifest says of the source."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> FoundBoxes:
        """Of a Detectron2 record; with what ``prepare`` made of it, if the source has that method."""
        ...


class AnnotationBoxes:
    """The annotated boxes of a record, by annotation id; crowds, which hold many objects, are left out."""

    def recipe(self) -> dict[str, Any]:
        """What the manifest says of the source."""
        return {"source": "annotations"}

    def __call__(self, record: Mapping[str, Any]) -> FoundBoxes:
        """:class:`FoundBoxes` of a Detectron2 record, scores 1.

        Raises:
            DataError: an annotation without id.
        """
        annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
        if any("id" not in a for a in annotations):
            raise DataError(
                f"image id {record['image_id']} has an annotation without id, by which its region would be found: "
                "give each an id (ovdet2 dataset check)."
            )
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        ids = torch.tensor([a["id"] for a in annotations], dtype=torch.int64)
        return FoundBoxes(boxes, torch.ones(len(boxes)), ids)


class FileBoxes:
    """Boxes found by somebody else: a COCO-results json, or a proposal file of Detectron2 (.pkl, arrays only)."""

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: ``.json``: list of {"image_id", "bbox" [x, y, w, h], "score"}; ``.pkl``: {"ids" (or "indexes"),
                "boxes", "objectness_logits" (or "scores"), "bbox_mode"}, a list entry for each image.

        Raises:
            DataError: another form; or a pickle that holds more than arrays.
        """
        self.path = Path(path)
        read = {".json": _results, ".pkl": _proposal_file}.get(self.path.suffix)
        if read is None:
            raise DataError(f"{path} is neither a COCO-results .json nor a proposal file .pkl of Detectron2.")
        self._image_ids, self._offsets, self._boxes, self._scores = read(self.path)

    def recipe(self) -> dict[str, Any]:
        """What the manifest says of the source."""
        return {"source": "file", "file_sha256": sha256_file(self.path)}

    def require_images(self, image_ids: Iterable[int]) -> int:
        """How many of some images the file has boxes for.

        Raises:
            DataError: for none of them, so it is of another data set.
        """
        count = int(np.isin(self._image_ids, list(image_ids)).sum())
        if not count:
            raise DataError(
                f"{self.path} has boxes for {len(self._image_ids)} images (ids {self._image_ids[:3].tolist()}, ...), "
                "none of which is in the data set: give the file that was made for it."
            )
        return count

    def __call__(self, record: Mapping[str, Any]) -> FoundBoxes:
        """:class:`FoundBoxes` of a Detectron2 record; none for an image the file does not name."""
        place = bisect.bisect_left(self._image_ids, record["image_id"])
        if place == len(self._image_ids) or self._image_ids[place] != record["image_id"]:
            return NO_BOXES
        rows = slice(self._offsets[place], self._offsets[place + 1])
        boxes = torch.from_numpy(self._boxes[rows].copy())
        return FoundBoxes(boxes, torch.from_numpy(self._scores[rows].copy()), torch.full((len(boxes),), -1))


def _results(path):
    """A COCO-results json, grouped by image in its own order."""
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
    """A proposal file of Detectron2 (see its load_proposals_into_dataset), read without running code from it."""
    try:
        with open(path, "rb") as handle:
            data = ArraysOnly(handle, encoding="latin1").load()
        ids = data["ids"] if "ids" in data else data["indexes"]
        per_image = data["scores"] if "scores" in data else data["objectness_logits"]
        boxes = [np.asarray(b, dtype=np.float32).reshape(-1, 4) for b in data["boxes"]]
        scores = [np.asarray(s, dtype=np.float32).reshape(-1) for s in per_image]
        image_ids = np.repeat(np.array([int(i) for i in ids], dtype=np.int64), [len(b) for b in boxes])
        boxes, scores = np.concatenate(boxes or [np.zeros((0, 4), np.float32)]), np.concatenate(scores or [[]])
        mode = int(data.get("bbox_mode", 0))
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
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
    """(unique image ids, offsets, boxes, scores) with the rows of an image together, otherwise in their order."""
    if not len(image_ids) == len(boxes) == len(scores):
        raise DataError(f"{path} has {len(boxes)} boxes but {len(scores)} scores for {len(image_ids)} image entries.")
    if len(scores) and not (np.isfinite(scores).all() and scores.min() >= 0 and scores.max() <= 1):
        raise DataError(f"{path} has scores outside [0, 1]: write probabilities.")
    order = np.argsort(image_ids, kind="stable")
    unique, counts = np.unique(image_ids, return_counts=True)
    return unique, np.concatenate([[0], counts.cumsum()]), boxes[order], scores[order]
