"""The merged predictions of a data set as columns.

Shapes: R detections of all images. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

import mmap
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from ovdet2.errors import DataError
from ovdet2.evaluation.columns import Detections
from ovdet2.evaluation.prediction_files import read_merged
from ovdet2.evaluation.proposal_recall import average_recall


@dataclass(frozen=True)
class DistractorDetections:
    """Detections of distractor words, R of them.

    Attributes:
        image_ids: [R] int64.
        words: [R] int64, index into the distractors of the evaluation.
        scores: [R] float32.
    """

    image_ids: np.ndarray
    words: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """What a merged file holds.

    Attributes:
        detections: :class:`~ovdet2.evaluation.columns.Detections` by ascending image id.
        recall: {"AR@100-novel": percent, ...}; empty when the model gave no proposals.
        distractor_detections: how many detections were of distractor words, which are not among ``detections``.
        distractors: :class:`DistractorDetections`; None without distractors, and for files of earlier versions, which
            have their number only.
    """

    detections: Detections
    recall: dict
    distractor_detections: int
    distractors: DistractorDetections | None = None


def read_predictions(path: str | Path) -> Predictions:
    """Read a merged file (:mod:`~ovdet2.evaluation.prediction_files`) line by line.

    Raises:
        DataError: proposals of some images only, or masks of some images with detections only.
    """
    columns, covered, masks = _Columns(), {}, _MaskWriter(Path(path).parent)
    distractors = _DistractorColumns()
    images, with_proposals, with_masks, without_masks, distractor_detections = 0, 0, 0, 0, 0
    for record in read_merged(path):
        images += 1
        distractor_detections += record.get("distractor_detections", 0)
        columns.add(record)
        distractors.add(record)
        if "masks" in record:
            with_masks += 1
            masks.add(record["mask_size"], record["masks"])
        elif record["scores"]:
            without_masks += 1
        with_proposals += "covered" in record
        for key, values in record.get("covered", {}).items():
            covered.setdefault(key, []).append(np.asarray(values, dtype=np.float64))
    for kind, count, others in (
        ("proposals", with_proposals, images - with_proposals),
        ("masks", with_masks, without_masks),
    ):
        if count and others:
            raise DataError(f"{count} of {count + others} images have {kind}: give them for all images or for none.")
    recall = {key: average_recall(np.concatenate(values)) for key, values in covered.items()}
    detections = Detections(*columns.finish(), masks=masks.finish() if with_masks else None)
    return Predictions(detections, recall, distractor_detections, distractors.finish())


class _DistractorColumns:
    """Collects the detections of distractor words image by image."""

    def __init__(self):
        self._columns = {"image_ids": array("q"), "words": array("q"), "scores": array("f")}
        self._known = False

    def add(self, record):
        """Append those of one image."""
        if "distractor_scores" not in record:
            return
        self._known = True
        self._columns["scores"].extend(record["distractor_scores"])
        self._columns["words"].extend(record["distractor_words"])
        self._columns["image_ids"].extend([record["image_id"]] * len(record["distractor_scores"]))

    def finish(self):
        """:class:`DistractorDetections`, or None."""
        types = {"image_ids": np.int64, "words": np.int64, "scores": np.float32}
        if not self._known:
            return None
        return DistractorDetections(**{name: np.array(self._columns[name], dtype=kind) for name, kind in types.items()})


class _Columns:
    """Collects detections image by image in one growing buffer per column, so that no second copy of all is made."""

    def __init__(self):
        self._buffers = {"image_ids": array("q"), "category_ids": array("q"), "scores": array("f"), "boxes": array("f")}

    def add(self, record):
        """Append the detections of one image."""
        rows = {
            "image_ids": np.full(len(record["scores"]), record["image_id"], dtype=np.int64),
            "category_ids": np.array(record["category_ids"], dtype=np.int64),
            "scores": np.array(record["scores"], dtype=np.float32),
            "boxes": np.array(record["boxes_xyxy"], dtype=np.float32).reshape(-1, 4),
        }
        for name, values in rows.items():
            self._buffers[name].frombytes(values.tobytes())

    def finish(self):
        """(image_ids, category_ids, scores, boxes_xyxy) of :class:`~ovdet2.evaluation.columns.Detections`."""
        image_ids, category_ids, scores, boxes = (
            np.frombuffer(buffer, dtype=np.int64 if buffer.typecode == "q" else np.float32)
            for buffer in self._buffers.values()
        )
        return image_ids, category_ids, scores, boxes.reshape(-1, 4)


class MaskColumn(Sequence):
    """Run-length codes of R masks, whose counts lie in an unnamed file that is mapped into memory.

    An element is {"size": [height, width], "counts": str}, made on access.

    Args:
        counts: bytes-like, the counts of all masks one after the other.
        offsets: [R + 1] int64, where each begins.
        sizes: [R, 2] int32, height and width.
    """

    def __init__(self, counts, offsets, sizes):
        self._counts, self._offsets, self._sizes = counts, offsets, sizes

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, row):  # pyrefly: ignore[bad-override]  no slices
        if not -len(self) <= row < len(self):
            raise IndexError(f"mask {row} of {len(self)}")
        row %= len(self)
        start, end = self._offsets[row : row + 2]
        return {"size": self._sizes[row].tolist(), "counts": self._counts[start:end].decode("ascii")}


class _MaskWriter:
    """Collects masks image by image in a file of ``folder`` (the system's may be in memory), made with the first."""

    def __init__(self, folder):
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._lengths: list[np.ndarray] = []
        self._sizes: list[np.ndarray] = []

    def add(self, size, counts):
        """Append the masks of one image: its (height, width) and their counts."""
        self._file = self._file or tempfile.TemporaryFile(dir=self._folder)
        self._file.write("".join(counts).encode("ascii"))
        self._lengths.append(np.array([len(code) for code in counts], dtype=np.int64))
        self._sizes.append(np.tile(np.array(size, dtype=np.int32), (len(counts), 1)))

    def finish(self):
        """The :class:`MaskColumn`, after :meth:`add`."""
        assert self._file is not None
        self._file.flush()
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._lengths))])
        counts = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if offsets[-1] else b""
        return MaskColumn(counts, offsets, np.concatenate(self._sizes))
