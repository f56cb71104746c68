"""Images with image-level labels (classes without boxes), of a COCO- or LVIS-like json or of a folder per class."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ovdet2.data.datasets.validity import image_name
from ovdet2.data.readers.faults import require_few, shown
from ovdet2.data.readers.packed import PackedStrings, as_int64, require_index
from ovdet2.data.readers.reader import Reader, stated_size
from ovdet2.data.samples import IMAGE_LABELS
from ovdet2.errors import DataError
from ovdet2.io.files import read_json

if TYPE_CHECKING:
    from ovdet2.data.datasets.coco_json import Split

_NONE = -(2**63)
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ImageLabels(Reader):
    """Images with image-level labels. A record has in addition:

    - "labels": tuple of int, at least one: contiguous ids of the split (base first), ascending.

    Attributes:
        split: :class:`~ovdet2.data.datasets.coco_json.Split` that defines the contiguous ids.
    """

    kind = IMAGE_LABELS

    split: Split

    def image_counts(self) -> np.ndarray:
        """Array [K] int64: number of images with each class."""
        raise NotImplementedError


class CocoImageLabels(ImageLabels):
    """Image labels of a json with COCO's lists "images" and "categories", in one or both of two forms:

    - "pos_category_ids" of an image, as in LVIS;
    - entries of "annotations" with "image_id" and "category_id"; their boxes are ignored.

    Images are in the order of the json. Repeated labels count once.
    """

    def __init__(
        self,
        json_file: str | Path,
        folder: str | Path,
        split: Split | Callable[[list[dict[str, Any]], Any], Split],
        novel_labels: bool = False,
        max_bad: int = 0,
    ) -> None:
        """
        Args:
            json_file: see above; images have "id", "file_name" (or LVIS's "coco_url", whose last two parts are the file
                name), and "height" and "width" in pixels if known.
            folder: that the file names are relative to.
            split: of the category ids, or a function of (category records, source) that reads it from the json.
            novel_labels: accept labels of novel classes.
            max_bad: number of images without a label that are skipped with a warning.

        Raises:
            DataError: no such json; an image without id or file name, listed twice, or outside of the folder; a label
                of an unknown image or class; a label of a novel class without ``novel_labels``; more images without a
                label than ``max_bad``, or no image left.
        """
        data = read_label_json(json_file)
        self.split = split(data["categories"], json_file) if callable(split) else split
        _require_names(data["categories"], self.split, json_file)
        self.folder = Path(folder)
        self._ids, names = _image_ids(data["images"], json_file), [_name_of(image) for image in data["images"]]
        wrong = [int(key) for key, name in zip(self._ids, names) if not _stays_inside(name)]
        if wrong:
            raise DataError(
                f"{json_file}: {len(wrong)} images have no file_name or one outside of the image folder, id "
                f"{shown(wrong)}: give each a path relative to {folder}."
            )
        rows, labels = self._read_labels(data, json_file)
        if not novel_labels:
            _require_base(self.split, labels, self._ids[rows], json_file)
        counts = np.bincount(rows, minlength=len(names))
        faults = [f"image {key} has no label" for key in self._ids[counts == 0].tolist()]
        require_few(faults, max_bad, json_file, int(np.count_nonzero(counts)), "label")
        labelled = np.flatnonzero(counts)
        self._ids, self._labels = self._ids[labelled], labels.astype(np.int32)
        self._firsts = np.concatenate([[0], np.cumsum(counts[labelled])])
        self._names = PackedStrings(str(names[row]) for row in labelled)
        self._sizes = np.array([stated_size(data["images"][row]) for row in labelled], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = require_index(index, len(self))
        first, end = self._firsts[index : index + 2]
        record = {
            "file_name": str(self.folder / self._names[index]),
            "image_id": int(self._ids[index]),
            "labels": tuple(self._labels[first:end].tolist()),
        }
        height, width = map(int, self._sizes[index])
        return record | ({"height": height, "width": width} if height else {})

    def image_counts(self) -> np.ndarray:
        return np.bincount(self._labels, minlength=len(self.split.names))

    def _read_labels(self, data, json_file):
        """(rows of images, contiguous labels), arrays of int64: each pair once, ascending."""
        images, categories = array("q"), array("q")
        for image in data["images"]:
            positives = image.get("pos_category_ids") or []
            if not isinstance(positives, list):
                raise DataError(f"{json_file}: pos_category_ids of the image {image['id']} is no list: make it one.")
            for category in positives:
                images.append(image["id"])
                categories.append(_number(category))
        for entry in data.get("annotations", ()):
            images.append(_number(entry.get("image_id")))
            categories.append(_number(entry.get("category_id")))
        order = np.argsort(self._ids)
        unlisted = "labels of images that are not in its images, image id"
        rows = _positions(self._ids[order], as_int64(images), unlisted, json_file)
        known = np.array(self.split.category_ids, dtype=np.int64)
        by_id = np.argsort(known)
        outside = f"labels of classes outside of the split {self.split.name}, category id"
        labels = _positions(known[by_id], as_int64(categories), outside, json_file)
        pairs = np.unique(order[rows] * len(known) + by_id[labels])
        return pairs // len(known), pairs % len(known)


class FolderImageLabels(ImageLabels):
    """Image labels of a folder with one subfolder of images per class, as of ImageNet.

    Images are ordered by folder and name; the id of an image is its position. Only files directly in a folder with an
    ending of :data:`IMAGE_ENDINGS` are read.
    """

    def __init__(
        self,
        folder: str | Path,
        split: Split,
        mapping: Mapping[str, str] | None = None,
        novel_labels: bool = False,
        source: str | Path | None = None,
    ) -> None:
        """
        Args:
            folder: that holds the folders of the classes.
            split: the classes. A folder is named as a class, or by its category id in the split.
            mapping: {folder: class name}, for folders of other names; folders that are not in it are not read.
            novel_labels: accept folders of novel classes.
            source: name of the mapping in messages.

        Raises:
            DataError: no such folder, a folder of an unknown class or without an image, or of a novel class without
                ``novel_labels``.
        """
        self.folder, self.split = Path(folder), split
        classes = self._classes(mapping, source)
        if not novel_labels:
            novel = [name for name, label in classes.items() if label >= len(split.base)]
            if novel:
                raise DataError(_novel(len(novel), "folders", split, source or folder, shown(novel)))
        self._folders, self._classes_of_folders = tuple(classes), np.array(list(classes.values()), dtype=np.int32)
        counts, empty = array("q"), []
        self._names = PackedStrings(self._files(counts, empty))
        if empty:
            raise DataError(
                f"{folder}: {len(empty)} folders of classes hold no image ({', '.join(IMAGE_ENDINGS)}): "
                f"{shown(empty)}. Unpack their images into them, or remove them."
            )
        self._firsts = np.cumsum([0, *counts])

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = require_index(index, len(self))
        place = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return {
            "file_name": str(self.folder / self._folders[place] / self._names[index]),
            "image_id": index,
            "labels": (int(self._classes_of_folders[place]),),
        }

    def image_counts(self) -> np.ndarray:
        counts = np.bincount(self._classes_of_folders, np.diff(self._firsts), len(self.split.names))
        return counts.astype(np.int64)

    def _classes(self, mapping, source):
        """{folder: contiguous class}, by ascending name of the folder."""
        try:
            present = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir() and entry.name[0] != ".")
        except OSError as error:
            raise DataError(
                f"{self.folder} cannot be read ({error.strerror}): give a folder that holds a folder for each class."
            ) from None
        positions = {name: position for position, name in enumerate(self.split.names)}
        if mapping is not None:
            absent = sorted(set(mapping) - set(present))
            if absent:
                raise DataError(
                    f"{self.folder} has no folder {shown(absent)}, which {source} names: remove it from {source}."
                )
            present, named = [name for name in present if name in mapping], mapping
        else:
            ids = {str(category_id): name for category_id, name in (*self.split.base, *self.split.novel)}
            named = {name: name if name in positions else ids.get(name, name) for name in present}
        unknown = [f"{name} ({named[name]})" if mapping else name for name in present if named[name] not in positions]
        if unknown:
            raise DataError(
                f"{source or self.folder} has {len(unknown)} folders that are no class of {self.split.name}: "
                f"{shown(unknown)}. Name the folders as the classes or by their ids, or give a mapping file "
                "{folder: class name} of the folders to use."
            )
        if not present:
            raise DataError(f"{self.folder} holds no folder of a class: give a folder that holds one for each class.")
        return {name: positions[named[name]] for name in present}

    def _files(self, counts, empty):
        """Yield the image names of all folders; append their counts to ``counts``, folders without any to ``empty``."""
        for name in self._folders:
            with os.scandir(self.folder / name) as entries:
                files = sorted(entry.name for entry in entries if entry.name.lower().endswith(IMAGE_ENDINGS))
            counts.append(len(files))
            if not files:
                empty.append(name)
            yield from files


def read_mapping(path: str | Path) -> dict[str, str] | None:
    """A mapping file {folder: class name}; None for a json of another form.

    Raises:
        DataError: missing or damaged file.
    """
    data = read_json(path, "give a json of images with labels, or one {folder: class name}")
    if isinstance(data, dict) and data and all(isinstance(value, str) for value in data.values()):
        return data
    return None


def read_label_json(path: str | Path) -> dict[str, Any]:
    """The parsed json of :class:`CocoImageLabels`, with its lists.

    Raises:
        DataError: missing or damaged file, or one without these lists.
    """
    data = read_json(path, "give a json of images with labels")
    lists = ("images", "categories", *(["annotations"] if isinstance(data, dict) and "annotations" in data else []))
    for key in lists:
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(
                f"{path} has no list {key!r} of objects: give a COCO- or LVIS-like json of images and categories, or "
                "a mapping {folder: class name}."
            )
    return data


def _require_names(categories, split, json_file):
    """Require the class names of the split in the json: with other category ids the labels would be wrong."""
    names, wrong = dict((*split.base, *split.novel)), []
    for category in categories:
        key, name = _number(category.get("id")), category.get("name")
        if names.get(key, name) != name:
            wrong.append(f"{key} ({name!r} for {names[key]!r})")
    if wrong:
        raise DataError(
            f"{json_file}: {len(wrong)} categories are not named as in the split {split.name}, id {shown(wrong)}: use "
            "a file with the data set's own category ids, or a Split with its names."
        )


def _image_ids(images, json_file):
    """Array [N] int64."""
    wrong = [image.get("id") for image in images if type(image.get("id")) is not int or not _fits(image["id"])]
    if wrong:
        raise DataError(f"{json_file}: {len(wrong)} images have no integer id ({shown(wrong)}): number them.")
    ids = np.fromiter((image["id"] for image in images), dtype=np.int64, count=len(images))
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        twice = values[counts > 1].tolist()
        raise DataError(f"{json_file}: {len(twice)} images are listed twice, id {shown(twice)}: keep one of each.")
    return ids


def _name_of(image):
    """File name of an image, or None if it has none."""
    return image_name(image, lvis=False) or image_name(image, lvis=True)


def _stays_inside(name):
    return isinstance(name, str) and name != "" and not os.path.isabs(name) and ".." not in name.split("/")


def _positions(known, values, what, json_file):
    """Position of each value in an ascending array; DataError for values that it does not have."""
    places = np.searchsorted(known, values)
    unknown = values[known[np.minimum(places, len(known) - 1)] != values] if len(known) else values
    if len(unknown):
        raise DataError(
            f"{json_file} has {len(unknown)} {what} {shown(np.unique(unknown).tolist())}: remove them, or give the "
            "classes and images of this json."
        )
    return places


def _require_base(split, labels, image_ids, json_file):
    novel = labels >= len(split.base)
    if novel.any():
        images = f"in the images {shown(np.unique(image_ids[novel]).tolist())}"
        raise DataError(_novel(int(novel.sum()), "labels", split, json_file, images))


def _novel(count, what, split, source, where):
    return (
        f"{source} holds {count} {what} of novel classes of {split.name}, first {where}: a detector trained on them "
        "has seen these classes. Remove them, or, if that is intended, register the data set with novel_labels: True."
    )


def _number(value):
    """``value`` if it is an integer of 64 bits; otherwise a number that no image or class has."""
    return value if type(value) is int and _fits(value) else _NONE


def _fits(value):
    return value.bit_length() < 64
