"""Detections that another tool wrote: COCO's results json, or predictions.jsonl of ovdet2, as columns.

The file is read entry by entry, so that memory does not grow with Python objects: 36 bytes a detection are held, with masks
their run-length codes lie in an unnamed file. Every error names the entry (its position in the file, from 0) and its image.

Shapes: R detections. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

import json
import math
import mmap
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask

from ovdet2.data.datasets.coco_json import Split, first_few
from ovdet2.errors import DataError, did_you_mean
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.predictions import MaskColumn

mask_api: Any = pycocotools.mask  # its types have no plain dicts
XYWH, XYXY = "xywh", "xyxy"
_CHUNK = 1 << 20  # characters
_LONGEST = 64 * _CHUNK  # of one entry
_OUTSIDE = 0.1  # share of boxes outside of their images from which XYXY read as XYWH is suspected
_SLACK = 2.0  # pixels by which a box may leave its image, for rounding


@dataclass(frozen=True)
class ForeignDetections:
    """What a file holds.

    Attributes:
        detections: in the order of the file; ``scores`` are nan where the file has none.
        outside: {name: number} of detections of classes that the annotation file has and the split has not; they are
            among ``detections``, with their category ids.
        unscored: the first entry without a score, as messages name it; "" if all have one.
    """

    detections: Detections
    outside: dict[str, int]
    unscored: str = ""


def read_foreign(
    path: str | Path,
    truth: Truth,
    split: Split,
    names: Mapping[int, str],
    boxes: str = XYWH,
    masks: bool = False,
    folder: str | Path | None = None,
) -> ForeignDetections:
    """Read the detections of a file.

    An entry is {"image_id", "category_id", "bbox", "score"}, with "segmentation" (a run-length code) for masks; a class may
    be named by "category_name" instead. Ids are numbers or texts of digits. Entries stand in a list, or one in each line. A
    line of ``predictions.jsonl`` has all detections of an image.

    Args:
        path: the file.
        truth, split: of the data set.
        names: {category id: class name} of the annotation file, for classes outside of the split.
        boxes: form of "bbox", "xywh" or "xyxy".
        masks: read "segmentation"; all entries must have it, or none.
        folder: of the unnamed file that holds the masks meanwhile; None: the system's for such files.

    Raises:
        DataError: the file is missing or has another form, or an entry is invalid; or the boxes are not ``boxes``.
    """
    reader = _Reader(Path(path), truth, split, names, boxes, masks, folder)
    for index, entry in enumerate(entries_of(Path(path))):
        reader.add(index, entry)
    return reader.finish()


def entries_of(path: Path) -> Iterator[Any]:
    """Yield the json values of a list, or of one in each line, without reading the file as a whole number of objects.

    Raises:
        DataError: the file is missing, empty or damaged, or holds one object with other lists.
    """
    decode = json.JSONDecoder().raw_decode
    try:
        with open(path, encoding="utf-8-sig") as handle:
            text, place, count, is_list, ended = handle.read(_CHUNK).lstrip(), 0, 0, False, False
            if not text:
                raise DataError(f"{path} is empty: give a list of detections in COCO's results form.")
            is_list, place = text[0] == "[", int(text[0] == "[")
            while True:
                problem = None
                place = _next(text, place, count)
                if place >= len(text) or (is_list and text[place] == "]"):
                    if place < len(text):
                        ended, place = True, place + 1
                        break
                else:
                    try:
                        value, after = decode(text, place)
                        if after < len(text) or not is_list:  # a number could go on
                            yield value
                            place, count = after, count + 1
                            continue
                    except json.JSONDecodeError as error:
                        if len(text) - place > _LONGEST:
                            raise _damaged(path, count, error) from None
                        problem = error
                more = handle.read(_CHUNK)
                if not more:
                    if place < len(text) and problem is not None:
                        raise _damaged(path, count, problem)
                    break
                text, place = text[place:] + more, 0
            if is_list and not ended:
                raise DataError(f"{path} ends within the list, at entry {count}: it was not written to its end.")
            if text[place:].strip() or handle.read(_CHUNK).strip():
                raise DataError(f"{path} has text after the list of {count} entries: give the list only.")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: check the path.") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): give a json file.") from None


def _next(text, place, count):
    """Where the next value begins: after spaces and, between two values, a comma."""
    comma = count == 0
    while place < len(text) and (text[place].isspace() or (text[place] == "," and not comma)):
        comma |= text[place] == ","
        place += 1
    return place


def _damaged(path, count, error):
    return DataError(f"{path}: entry {count} is not valid JSON ({error}): write the file again.")


class _Reader:
    """Collects entries in one growing buffer per column, and evidence about the form of the boxes."""

    def __init__(self, path, truth, split, names, boxes, masks, folder):
        self._path, self._images, self._boxes, self._with_masks = path, truth.images, boxes, masks
        self._split, self._names = split, names
        self._ids = set(split.category_ids)
        self._id_of = {name: category_id for category_id, name in names.items()}
        self._id_of |= dict(zip(split.names, split.category_ids))
        self._buffers = {"image_ids": array("q"), "category_ids": array("q"), "scores": array("f"), "boxes": array("f")}
        self._masks = _Codes(folder) if masks else None
        self._outside: dict[str, int] = {}
        self._unscored = ""
        self._leaves, self._no_xyxy, self._largest, self._leaver = 0, 0, 0.0, ""

    def add(self, index, entry):
        if not isinstance(entry, dict):
            raise self._fault(f"entry {index}", f"it is {_short(entry)}", "an entry is an object, of one detection")
        if "boxes_xyxy" in entry:
            self._add_record(index, entry)
            return
        if "image_id" not in entry:
            lists = [key for key, value in entry.items() if isinstance(value, list)]
            hint = f"; give the list {lists[0]!r} in it as a file" if lists else ""
            raise self._fault(f"entry {index}", f"it has no image_id, only {first_few(list(entry))}", f"add it{hint}")
        where, image = self._image_of(index, entry)
        category_id = self._category_of(where, entry)
        code = self._code_of(where, entry, image)
        box = entry.get("bbox")
        if box is None and code is not None:
            box = mask_api.toBbox(code).tolist()
            self._append(where, image, category_id, box, entry.get("score"), XYWH)
        else:
            self._append(where, image, category_id, box, entry.get("score"), self._boxes)
        if self._masks is not None and code is not None:
            self._masks.add(code)

    def _add_record(self, index, entry):
        """A line of predictions.jsonl."""
        where, image = self._image_of(index, entry)
        ids, scores, boxes = (entry.get(key) for key in ("category_ids", "scores", "boxes_xyxy"))
        lists = (ids, scores, boxes)
        if not all(isinstance(each, list) for each in lists) or len({len(each) for each in lists}) > 1:
            raise self._fault(
                where, "its category_ids, scores and boxes_xyxy are no lists of one length", "write it again"
            )
        masks = self._masks
        codes = entry.get("masks") if masks is not None else None
        for number, (category_id, score, box) in enumerate(zip(*lists)):
            place = f"{where}, detection {number}"
            category_id = self._category_of(place, {"category_id": category_id})
            self._append(place, image, category_id, box, score, XYXY)
            if masks is not None and codes is not None:
                if not isinstance(codes, list) or len(codes) != len(scores):
                    raise self._fault(where, "its masks are no list of one for each box", "write it again")
                segmentation = {"size": entry.get("mask_size"), "counts": codes[number]}
                masks.add(self._code_of(place, {"segmentation": segmentation}, image))

    def _image_of(self, index, entry):
        """(where, the image's record): ``where`` names the entry in messages."""
        image_id = _integer(entry["image_id"])
        where = f"entry {index} (image id {_short(entry['image_id'])})"
        if image_id is None:
            raise self._fault(where, "the image id is no whole number", "give the id of the annotation file")
        if image_id not in self._images:
            raise self._fault(
                where, "the data set has no such image", f"its ids are such as {first_few(list(self._images)[:3])}"
            )
        return where, self._images[image_id]

    def _category_of(self, where, entry):
        value = entry.get("category_id", entry.get("category_name"))
        category_id = _integer(value)
        if category_id is None and isinstance(value, str):
            category_id = self._id_of.get(value)
            if category_id is None:
                remedy = f"use its names{did_you_mean(value, self._id_of)}"
                raise self._fault(where, f"the data set has no class named {_short(value)}", remedy)
        if category_id is None:
            raise self._fault(
                where, f"category_id is {_short(value)}", "give the id or the name of the annotation file"
            )
        if category_id not in self._ids:
            if category_id not in self._names:
                raise self._fault(
                    where,
                    f"the data set has no category {category_id}",
                    f"give the ids of the annotation file, such as {first_few(sorted(self._ids)[:3])}, not numbers of the "
                    "model's outputs",
                )
            name = self._names[category_id]
            self._outside[name] = self._outside.get(name, 0) + 1
        return category_id

    def _append(self, where, image, category_id, box, score, form):
        if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
            raise self._fault(where, f"bbox is {_short(box)}", "give four finite numbers")
        a, b, c, d = map(float, box)
        if form == XYXY and (c < a or d < b):
            raise self._fault(where, f"bbox {box} ends before it begins", "the file has xywh: remove --boxes xyxy")
        if form == XYWH and (c < 0 or d < 0):
            raise self._fault(where, f"bbox {box} has a negative size", "give (left, top, width, height)")
        if form == XYWH:
            width, height = image.get("width", math.inf), image.get("height", math.inf)
            if a + c > width + _SLACK or b + d > height + _SLACK:
                self._leaves += 1
                self._leaver = self._leaver or f"{where}, bbox {box}"
            self._no_xyxy += c < a or d < b or c > width + _SLACK or d > height + _SLACK
        self._largest = max(self._largest, abs(a), abs(b), abs(c), abs(d))
        if score is not None and not _is_number(score):
            raise self._fault(where, f"score is {_short(score)}", "give a finite number")
        if score is None:
            self._unscored = self._unscored or where
        self._buffers["image_ids"].append(image["image_id"] if "image_id" in image else image["id"])
        self._buffers["category_ids"].append(category_id)
        self._buffers["scores"].append(math.nan if score is None else score)
        self._buffers["boxes"].extend((a, b, c, d) if form == XYXY else (a, b, a + c, b + d))

    def _code_of(self, where, entry, image):
        """The compressed run-length code of an entry; None without one that is read."""
        code = entry.get("segmentation")
        if code is None or (not self._with_masks and entry.get("bbox") is not None):
            return None
        size = [image.get("height"), image.get("width")]
        if not isinstance(code, dict) or not isinstance(code.get("counts"), (str, list)):
            raise self._fault(where, f"segmentation is {_short(code)}", "give a run-length code, {size, counts}")
        if code.get("size") != size:
            raise self._fault(where, f"the mask has the size {_short(code.get('size'))}", f"the image has {size}")
        try:
            if isinstance(code["counts"], list):
                code = mask_api.frPyObjects(code, *size)
                return {"size": size, "counts": code["counts"].decode("ascii")}
            mask_api.area(code)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._fault(where, f"its mask cannot be read ({error})", "write the file again") from None
        return {"size": size, "counts": code["counts"]}

    def finish(self):
        count = len(self._buffers["scores"])
        if count and self._largest <= 2:
            raise DataError(
                f"{self._path}: no coordinate is above {self._largest:g}: the boxes are relative to the image. Multiply them by "
                "its width and height."
            )
        if self._leaves >= max(1, _OUTSIDE * count) and not self._no_xyxy:
            raise DataError(
                f"{self._path}: read as (left, top, width, height), {self._leaves} of {count} boxes leave their image, and all "
                f"are valid as (left, top, right, bottom); the first is {self._leaver}. Add --boxes xyxy, or convert them."
            )
        if self._masks is not None and 0 < len(self._masks) < count:
            raise DataError(
                f"{self._path}: {len(self._masks)} of {count} entries have a segmentation: give it in all or in none."
            )
        image_ids, category_ids, scores, boxes = (
            np.frombuffer(buffer, dtype=np.int64 if buffer.typecode == "q" else np.float32)
            for buffer in self._buffers.values()
        )
        masks = self._masks.finish() if self._masks is not None and len(self._masks) else None
        detections = Detections(image_ids, category_ids, scores, boxes.reshape(-1, 4), masks)
        return ForeignDetections(detections, self._outside, self._unscored)

    def _fault(self, where, what, remedy):
        return DataError(f"{self._path}: {where}: {what}: {remedy}.")


class _Codes:
    """Run-length codes in an unnamed file of ``folder``."""

    def __init__(self, folder):
        self._file = tempfile.TemporaryFile(dir=folder)
        self._lengths, self._sizes = array("q"), array("i")

    def __len__(self):
        return len(self._lengths)

    def add(self, code):
        counts = code["counts"].encode("ascii")
        self._file.write(counts)
        self._lengths.append(len(counts))
        self._sizes.extend(code["size"])

    def finish(self):
        self._file.flush()
        offsets = np.concatenate([[0], np.cumsum(np.frombuffer(self._lengths, dtype=np.int64))])
        counts = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if offsets[-1] else b""
        return MaskColumn(counts, offsets, np.frombuffer(self._sizes, dtype=np.int32).reshape(-1, 2))


def _integer(value):
    """A whole number below 2**63, also from a text of digits or a float such as 3.0; None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
