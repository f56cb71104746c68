"""Register data sets without boxes: captioned images, and images with image-level labels.

Loading one gives a :class:`~ovdet2.data.readers.reader.Reader`, a sequence of records. No file is read before that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import (
    CHECK_PATH,
    Location,
    ReadSplit,
    class_metadata,
    existing,
    remember_split,
    require_free,
    require_names,
    resolve,
    split_by_names,
    split_of_json,
    stamp_of,
)
from ovdet2.data.readers.coco_captions import CocoCaptions
from ovdet2.data.readers.image_labels import (
    CocoImageLabels,
    FolderImageLabels,
    ImageLabels,
    read_label_json,
    read_mapping,
)
from ovdet2.data.readers.reader import CaptionReader
from ovdet2.data.readers.tar_shards import TarShards
from ovdet2.data.readers.tsv_captions import TsvCaptions
from ovdet2.data.samples import CAPTIONS, IMAGE_LABELS
from ovdet2.errors import UsageError

FORMATS = ("coco", "tsv", "tar")
_MAX_BAD = 10  # the default of DATALOADER.MAX_BAD_IMAGES


def register_captions(
    name: str,
    file: Location,
    image_root: Location | None = None,
    format: str = "coco",
    *,
    max_bad: int = _MAX_BAD,
    index_file: Location | None = None,
    prepare: Callable[[], object] | None = None,
    remedy: str = CHECK_PATH,
) -> None:
    """Register captioned images.

    Metadata: ov_kind and evaluator_type ("captions", which have no evaluator) and ov_files, a callable that returns the
    current (file, image root). Loading gives a :class:`~ovdet2.data.readers.reader.CaptionReader`.

    Args:
        name: name for a source of training images (DATASETS.SOURCES).
        file: a COCO-captions json, a tsv file, or a glob pattern of tar shards; a path, or a callable returning one; a
            relative path is below :func:`~ovdet2.data.datasets.register.data_root` at the time of loading.
        image_root: folder that the names of images are relative to, given like ``file``; None for shards.
        format: "coco" (:class:`CocoCaptions`), "tsv" (:class:`TsvCaptions`) or "tar" (:class:`TarShards`).
        max_bad: number of images without a usable caption that are skipped with a warning; more are an error.
        index_file: with "tar", file of the index of the shards; None: next to them.
        prepare: see :func:`~ovdet2.data.datasets.register.register_dataset`.
        remedy: what to do when the data set is missing.

    Raises:
        UsageError: the name is already registered, the format is unknown, or the image folder is missing.
    """
    require_free(name)
    if format not in FORMATS:
        raise UsageError(f"the format of {name!r} is {format!r}: choose one of {', '.join(FORMATS)}.")
    if (image_root is None) != (format == "tar"):
        raise UsageError(
            f"the captions {name!r} of the format {format!r} have the image folder {image_root!r}: give a folder for "
            "coco and tsv, and none for tar, whose shards hold the images."
        )

    def files() -> tuple[Path, ...]:
        return tuple(resolve(path) for path in (file, image_root) if path is not None)

    def load() -> CaptionReader:
        if format == "tar":
            if prepare is not None:
                prepare()
            return TarShards(resolve(file), None if index_file is None else resolve(index_file), max_bad)
        captions, folder = existing(name, files, prepare, remedy)
        return (CocoCaptions if format == "coco" else TsvCaptions)(captions, folder, max_bad)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(ov_kind=CAPTIONS, evaluator_type=CAPTIONS, ov_files=files)


def register_image_labels(
    name: str,
    source: Location | None,
    image_root: Location,
    split: Split | ReadSplit | Sequence[str],
    *,
    novel_names: Sequence[str] = (),
    novel_labels: bool = False,
    max_bad: int = _MAX_BAD,
    prepare: Callable[[], object] | None = None,
    remedy: str = CHECK_PATH,
) -> None:
    """Register images with image-level labels and without boxes.

    Metadata: ov_kind and evaluator_type ("image_labels", which have no evaluator), ov_novel_labels, ov_split,
    ov_classes_known (no file must be read for them), and ov_files, a callable that returns the current (json or None, image root). Once it is loaded also ov_image_counts
    (number of images with each class) and the entries of the classes, see
    :func:`~ovdet2.data.datasets.register.register_dataset`. Loading gives an
    :class:`~ovdet2.data.readers.image_labels.ImageLabels`.

    Args:
        name: name for a source of training images (DATASETS.SOURCES).
        source: a COCO- or LVIS-like json, see :class:`CocoImageLabels`; or a json {folder: class name} for folders
            below ``image_root``; or None, if these folders are named as the classes or by their category ids, see
            :class:`FolderImageLabels`. A path, or a callable returning one; a relative path is below
            :func:`~ovdet2.data.datasets.register.data_root` at the time of loading.
        image_root: folder of the images, given like ``source``.
        split: the classes, which define the contiguous label ids: :class:`~ovdet2.data.datasets.coco_json.Split`; or
            names of base classes; or, for a COCO- or LVIS-like json, a function of (category records, source), such as
            :func:`~ovdet2.data.datasets.lvis_split.frequency_split`.
        novel_names: names of novel classes, if ``split`` is a list of names.
        novel_labels: accept labels of novel classes, whose names a detector then is trained on; otherwise they are an
            error.
        max_bad: number of images of a json without a label that are skipped with a warning; more are an error.
        prepare, remedy: see :func:`~ovdet2.data.datasets.register.register_dataset`.

    Raises:
        UsageError: the name is already registered, or the classes are no split.
    """
    require_free(name)
    if isinstance(split, str) or (novel_names and (callable(split) or isinstance(split, Split))):
        raise UsageError(f"the classes of {name!r} are {split!r} and {novel_names!r}: give a Split, or lists of names.")
    for what, names in (("split", split), ("novel_names", novel_names)):
        if not callable(names) and not isinstance(names, Split):
            require_names(names, f"{what} of {name!r}")
    images = _LabelledImages(
        name, source, image_root, split, tuple(novel_names), novel_labels, max_bad, prepare, remedy
    )
    DatasetCatalog.register(name, images.load)
    MetadataCatalog.get(name).set(
        ov_kind=IMAGE_LABELS,
        evaluator_type=IMAGE_LABELS,
        ov_files=images.files,
        ov_split=images.resolve_split,
        ov_novel_labels=novel_labels,
        ov_classes_known=not callable(split),
    )


@dataclass(frozen=True)
class _LabelledImages:
    """The arguments of :func:`register_image_labels`; reads the files when they are needed."""

    name: str
    source: Location | None
    image_root: Location
    split: Split | ReadSplit | Sequence[str]
    novel_names: tuple[str, ...]
    novel_labels: bool
    max_bad: int
    prepare: Callable[[], object] | None
    remedy: str

    def files(self) -> tuple[Path | None, Path]:
        """(json or None, image root)."""
        return None if self.source is None else resolve(self.source), resolve(self.image_root)

    def load(self) -> ImageLabels:
        """Load the records and update the data set's metadata from the current files."""
        json_path, folder, folder_names = self._prepared()
        if json_path is None or folder_names is not None:
            split = self._split_of_folders()
            reader: ImageLabels = FolderImageLabels(folder, split, folder_names, self.novel_labels, json_path)
        else:
            stamp = stamp_of(self.name, json_path)
            reader = CocoImageLabels(json_path, folder, self._split_of_json(), self.novel_labels, self.max_bad)
            remember_split(stamp, reader.split)
        # Set through __dict__, since Metadata refuses other values: the data root may differ between loads.
        counts = {"ov_image_counts": reader.image_counts().tolist()}
        MetadataCatalog.get(self.name).__dict__.update(counts | class_metadata(reader.split))
        return reader

    def resolve_split(self) -> Split:
        """The classes, read from the json if it defines them."""
        read = self._split_of_json()
        if isinstance(read, Split):
            return read
        json_path, _, folder_names = self._prepared()
        if json_path is None or folder_names is not None:
            return self._split_of_folders()
        return split_of_json(self.name, json_path, read, read_label_json)

    def _prepared(self) -> tuple[Path | None, Path, dict[str, str] | None]:
        """(json or None, image root, {folder: class name} if the json is such a mapping, else None)."""
        existing(self.name, lambda: tuple(path for path in self.files() if path is not None), self.prepare, self.remedy)
        json_path, folder = self.files()
        return json_path, folder, None if json_path is None else read_mapping(json_path)

    def _split_of_json(self) -> Split | ReadSplit:
        if isinstance(self.split, Split) or callable(self.split):
            return self.split
        return partial(split_by_names, self.name, tuple(self.split), self.novel_names)

    def _split_of_folders(self) -> Split:
        if isinstance(self.split, Split):
            return self.split
        if callable(self.split):
            raise UsageError(f"{self.name} has folders of classes: give their split as a Split or as names of classes.")
        return _numbered(self.name, self.split, self.novel_names)


def _numbered(title, base_names: Sequence[Any], novel_names: Sequence[Any]) -> Split:
    """A split of class names without category ids; their positions become the ids."""
    pairs = tuple(enumerate((*base_names, *novel_names)))
    return Split(title, pairs[: len(base_names)], pairs[len(base_names) :])
