"""Load the records of registered data sets, and check that no label of a novel class reaches training."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_only_crowd_annotations, print_instances_class_histogram
from detectron2.data.detection_utils import check_metadata_consistency
from detectron2.utils import comm

from ovdet2.data.datasets.coco_json import Split, first_few
from ovdet2.data.datasets.register import require_metric, split_of
from ovdet2.data.samples import BOXES, IMAGE_LABELS
from ovdet2.errors import DataError, OVDetError, UsageError

_SHOWN = 5  # image ids named in an error message


def load_records(
    names: Sequence[str], key: str, filter_empty: bool, base_only: bool = False, kind: str = BOXES
) -> Sequence[Mapping[str, Any]]:
    """The records of one or several registered data sets of one kind, one after another.

    Args:
        names: of data sets.
        key: configuration key they come from, for messages.
        filter_empty: skip images without a box that is not a crowd.
        base_only: for training: refuse annotations of novel classes, however the data set was registered. Also refuse
            image labels of novel classes, unless it was registered with ``novel_labels`` (metadata
            ``ov_novel_labels``).
        kind: annotation kind of the data sets, one of :data:`~ovdet2.data.samples.KINDS`.

    Returns:
        list of dicts; or, of a single data set with a lazy reader, its sequence.

    Raises:
        UsageError: no name, an unknown one, data sets with different classes, or several of which one is no list.
        DataError: a missing file, no image left, or an annotation or image label of a novel class.
    """
    import ovdet2.data.datasets  # noqa: F401  registers the data sets

    known = DatasetCatalog.list()
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        registered = ", ".join(
            sorted(name for name in known if name.startswith(("ov_", "closed_", "transfer_", "coco_captions_")))
        )
        raise UsageError(f"{key} is {list(names)}: name registered data sets. ovdet2 registers: {registered}.")
    try:
        if kind == BOXES:
            return _joined_records(names, filter_empty, base_only)
        return _weak_records(names, base_only and kind == IMAGE_LABELS)
    except FileNotFoundError as error:
        raise DataError(
            f"a file of {', '.join(names)} is missing ({error}): set DETECTRON2_DATASETS to the folder of your "
            "data sets, or prepare them as datasets/README.md describes."
        ) from None
    except OVDetError:
        raise
    except ValueError as error:
        raise UsageError(
            f"the data sets {', '.join(names)} cannot be joined ({error}): make each a separate entry of "
            "DATASETS.SOURCES."
        ) from None
    except AssertionError as error:
        raise DataError(f"{key} {list(names)} has no image to use ({error}).") from None


def _joined_records(names, filter_empty, base_only):
    """The joined records of several data sets, as of Detectron2's ``get_detection_dataset_dicts``.

    Each data set is checked for novel classes before images are filtered: a crowd of a novel class is a novel label.

    Raises:
        ValueError: the classes of the data sets differ; AssertionError: one of them is empty.
        DataError: no image is left, or an annotation of a novel class is found.
    """
    joined = []
    for name in names:
        loaded = get_detection_dataset_dicts([name], filter_empty=False, check_consistency=False)
        # A list, or a torch Dataset, which has a length and items too.
        records = cast(Sequence[Mapping[str, Any]], loaded)
        split = split_of(name)
        if base_only and split is not None:
            require_base_only(name, records, split)
        joined.extend(records)
    if filter_empty and "annotations" in joined[0]:
        joined = filter_images_with_only_crowd_annotations(joined)
        if not joined:
            raise DataError(f"no image of {', '.join(names)} has a box that is not a crowd: check the annotations.")
    if "annotations" in joined[0]:
        with contextlib.suppress(AttributeError):  # a data set without class names
            check_metadata_consistency("thing_classes", list(names))
            print_instances_class_histogram(joined, MetadataCatalog.get(names[0]).thing_classes)
    return joined


def _weak_records(names, base_only):
    """Records with captions or image labels.

    Raises:
        UsageError: several data sets, of which one is no list.
        DataError: no image, or an image label of a novel class.
    """
    loaded = [DatasetCatalog.get(name) for name in names]
    for name, records in zip(names, loaded):
        split = split_of(name)
        if not len(records):
            raise DataError(f"the data set {name} has no image: check its files.")
        # A lazy reader has refused such labels when it was opened.
        listed = isinstance(records, list) and split is not None
        if base_only and listed and not MetadataCatalog.get(name).get("ov_novel_labels"):
            _require_base_labels(name, records, split)
    if len(loaded) == 1:
        return loaded[0]
    if not all(isinstance(records, list) for records in loaded):
        raise UsageError(
            f"the data sets {', '.join(names)} cannot be joined, since one of them reads its records lazily: make each "
            "a source of DATASETS.SOURCES."
        )
    return [record for records in loaded for record in records]


def _require_base_labels(name, records, split):
    """Refuse image labels of novel classes: a detector that is trained on them is not evaluated zero-shot.

    Raises:
        DataError: an image has one.
    """
    novel = [record for record in records if any(label >= len(split.base) for label in record["labels"])]
    if novel:
        shown = ", ".join(str(record["image_id"]) for record in novel[:_SHOWN]) + (", ..." if novel[_SHOWN:] else "")
        raise DataError(
            f"{len(novel)} images of the training set {name} have labels of novel classes of {split.name}, first "
            f"{shown}: a detector trained on them has seen these classes. If that is intended, register {name} with "
            "novel_labels=True."
        )


def require_base_only(name: str, records: Sequence[Mapping[str, Any]], split: Split) -> None:
    """Refuse a training set with labels of novel classes, which the open-vocabulary protocol forbids.

    A label is an annotation, or a statement that a novel class is absent (LVIS's "neg_category_ids").

    Args:
        name: of the data set, for the message.
        records: Detectron2 records with contiguous, base-first category ids.
        split: the data set's :class:`~ovdet2.data.datasets.coco_json.Split`.

    Raises:
        DataError: there is a label of a novel class, crowds included.
    """
    count, image_ids = 0, []
    novel_ids = {category_id for category_id, _ in split.novel}
    for record in records:
        novel = sum(box["category_id"] >= len(split.base) for box in record.get("annotations", ()))
        novel += len(novel_ids.intersection(record.get("neg_category_ids", ())))
        if novel:
            count += novel
            image_ids.append(record["image_id"])
    if count:
        shown = ", ".join(map(str, image_ids[:_SHOWN])) + (", ..." if len(image_ids) > _SHOWN else "")
        raise DataError(
            f"the training set {name} holds {count} labels of novel classes of {split.name}, first in the images "
            f"{shown}: prepare a json of the base classes only (datasets/README.md) and register it with "
            "base_only=True."
        )


def require_one_base(cfg: CfgNode, trained: Sequence[str]) -> None:
    """Require that the training sets and the first test set have the same base classes.

    The detector's vocabulary comes from the first test set, so other base classes would get wrong class ids.

    Args:
        cfg: configuration; DATASETS.TEST is read.
        trained: names of the training sets that have classes.

    Raises:
        UsageError: two data sets have different base classes or name them in another order, or one has a split and
            another has none.
    """
    names = [*trained, *cfg.DATASETS.TEST[:1]]
    splits = [split_of(name) for name in names]
    # By name: contiguous ids follow the order of the names, whatever category ids each json has for them.
    bases = [None if split is None else split.names[: len(split.base)] for split in splits]
    for name, base in zip(names, bases, strict=True):
        if base != bases[0]:
            raise UsageError(
                f"{names[0]} and {name} have different base classes{_difference(bases[0], base)}: train with the "
                "DATASETS.TEST of the same split (register_ov_dataset makes a split for a data set), and evaluate on the "
                "other with --eval-only."
            )


def _difference(base, other):
    """ " (...)" that says how two lists of names differ."""
    if base is None or other is None:
        return " (one has none)"
    if set(base) == set(other):
        return " (the same names in another order)"
    return f" (only in one of them: {first_few(sorted(set(base) ^ set(other)))})"


def require_test_sets(cfg: CfgNode) -> None:
    """Load the data sets of DATASETS.TEST and look for their image files: a fault found after training costs days.

    A collective call: the first process looks, every process fails.

    Args:
        cfg: configuration; DATASETS.TEST is read.

    Raises:
        UsageError: a data set is not registered, or ovdet2 has no metric for it.
        DataError: an annotation file has a fault, or image files are missing.
    """
    found = None
    if comm.is_main_process():
        try:
            for name in cfg.DATASETS.TEST:
                records = load_records([name], "DATASETS.TEST", filter_empty=False)
                require_metric(name)
                _require_files(name, records)
        except OVDetError as error:
            found = type(error), str(error)
    found = next((fault for fault in comm.all_gather(found) if fault is not None), None)
    if found is not None:
        raise found[0](found[1])


def _require_files(name, records):
    missing = [record["file_name"] for record in records if not _is_there(record["file_name"])]
    if missing:
        hint = " Backslashes in a file name separate no folders here: write slashes." if "\\" in missing[0] else ""
        raise DataError(
            f"{len(missing)} of {len(records)} images of the test set {name} do not exist: {first_few(missing)}: check "
            f"the folder of its images before training, since evaluation needs all of them.{hint}"
        )


def _is_there(path):
    try:
        return Path(path).is_file()
    except ValueError:  # a null character in the name
        return False
