"""Register data sets with boxes in Detectron2's catalogs. No file is read before a data set is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.data.datasets.coco_json import Split, first_few, read_coco_json, records_of
from ovdet2.data.datasets.validity import classes_of
from ovdet2.data.samples import BOXES
from ovdet2.errors import DataError, UsageError

METRICS = ("ov_coco", "ov_lvis", "ov_voc")
Location = str | Path | Callable[[], str | Path]
ReadSplit = Callable[[list[dict[str, Any]], Any], Split]
CHECK_PATH = "check its path: relative paths are below the data folder, $DETECTRON2_DATASETS or ./datasets"
# (data set, json path, time of its last change, size) -> Split, if the json defines it
_SPLITS: dict[tuple[str, str, int, int], Split] = {}


def data_root() -> Path:
    """The root folder of data sets: $DETECTRON2_DATASETS, or ``datasets`` below the working directory."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def register_ov_dataset(
    name: str,
    json_file: Location,
    image_root: Location,
    base_names: Sequence[str],
    novel_names: Sequence[str] = (),
    **options: Any,
) -> None:
    """Register a user's data set with lists of base and novel class names.

    Args:
        name: name for DATASETS.TRAIN / DATASETS.TEST.
        json_file: COCO-format annotations; a relative path is below :func:`data_root`.
        image_root: folder its "file_name" entries are relative to; likewise.
        base_names: class names, as in the json's "categories", that a detector is trained on.
        novel_names: class names that only appear at test. Categories in neither list must have no annotations.
        options: of :func:`register_dataset`; give ``base_only=True`` for training data.

    Raises:
        UsageError: the name is already registered, or the names are no lists of text. On loading: a class name that the json does not have, or has twice.
    """
    for what, names in (("base_names", base_names), ("novel_names", novel_names)):
        require_names(names, f"{what} of {name!r}")
    split = partial(split_by_names, name, tuple(base_names), tuple(novel_names))
    register_dataset(name, json_file, image_root, split, **options)


def register_dataset(
    name: str,
    json_file: Location,
    image_root: Location,
    split: Split | ReadSplit,
    *,
    metric: str = "ov_coco",
    prepare: Callable[[], object] | None = None,
    base_only: bool = False,
    masks: bool = False,
    pseudo_labels: bool = False,
    validation_set: str = "",
    remedy: str = CHECK_PATH,
) -> None:
    """Register a data set under ``name`` in Detectron2's DatasetCatalog and MetadataCatalog.

    Metadata: ov_kind ("boxes"), evaluator_type (``metric``), ov_masks, ov_validation_set, ov_classes_known (no file
    must be read for them), and ov_files, a callable that returns the
    current (json path, image root). If ``split`` is a Split, and otherwise once the data set is loaded: thing_classes
    (K names, base first) and thing_dataset_id_to_contiguous_id. Once it is loaded also json_file, image_root and
    ov_image_counts (number of images with each class). :func:`split_of` returns the split.

    Args:
        name: name for DATASETS.TRAIN / DATASETS.TEST.
        json_file: path, or callable returning one; a relative path is below :func:`data_root` at the time of loading.
        image_root: the same for the folder of images.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`, or a function of (category records, source) that reads
            it from the json, such as :func:`~ovdet2.data.datasets.lvis_split.frequency_split`.
        metric: "ov_coco", "ov_lvis" (an LVIS json: federated lists are read) or "ov_voc".
        prepare: optional callable without arguments, called before each load: it makes missing files and refuses
            outdated ones. Several processes may call it concurrently, so it must lock.
        base_only: refuse labels of novel classes; give True for training data.
        masks: load segmentations as well.
        pseudo_labels: accept a json with annotations that a detector made from the names of novel classes (ovdet2
            dataset pseudo-labels); otherwise such a json is refused.
        validation_set: given for a test set, which no setting may be chosen on: the data set that settings are chosen
            on in its place. See :func:`validation_set_of`.
        remedy: what to do when the data set is missing, such as the command that makes it.

    Raises:
        UsageError: the name is already registered, or the metric is unknown.
    """
    require_free(name)
    if metric not in METRICS:
        raise UsageError(f"the metric of {name!r} is {metric!r}: choose one of {', '.join(METRICS)}.")

    files = partial(_resolved, json_file, image_root)
    prepared = partial(existing, name, files, prepare, remedy)

    def load() -> list[dict[str, Any]]:
        json_path, image_path = prepared()
        return _load_boxes(name, json_path, image_path, split, metric, base_only, masks, pseudo_labels)

    def resolve_split() -> Split:
        return split_of_json(name, prepared()[0], split, read_coco_json) if callable(split) else split

    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(name)
    metadata.set(ov_kind=BOXES, evaluator_type=metric, ov_masks=masks, ov_files=files, ov_split=resolve_split)
    metadata.set(ov_validation_set=validation_set, ov_classes_known=not callable(split))
    if not callable(split):
        metadata.set(**class_metadata(split))


def _resolved(json_file: Location, image_root: Location) -> tuple[Path, Path]:
    return resolve(json_file), resolve(image_root)


def _load_boxes(
    name: str,
    json_path: Path,
    image_path: Path,
    split: Split | ReadSplit,
    metric: str,
    base_only: bool,
    masks: bool,
    pseudo_labels: bool,
) -> list[dict[str, Any]]:
    """Load the records of a data set and update its metadata from the current files."""
    stamp = stamp_of(name, json_path)
    data = read_coco_json(json_path)
    _require_pseudo_labels_allowed(name, data, json_path, pseudo_labels)
    classes = split(data["categories"], json_path) if callable(split) else split
    records = records_of(data, json_path, image_path, classes, base_only, masks, federated=metric == "ov_lvis")
    # Set through __dict__, since Metadata refuses other values: the data root may differ between loads.
    MetadataCatalog.get(name).__dict__.update(
        json_file=str(json_path),
        image_root=str(image_path),
        ov_image_counts=_image_counts(records, classes),
    )
    if callable(split):
        MetadataCatalog.get(name).__dict__.update(class_metadata(classes))
        remember_split(stamp, classes)
    return records


def require_metric(name: str) -> str:
    """The metric of a registered data set.

    Raises:
        UsageError: it is none of ovdet2's.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    if kind not in METRICS:
        raise UsageError(
            f"the data set {name} has evaluator type {kind!r}; ovdet2 evaluates {', '.join(METRICS)}: "
            "register it with ovdet2.data.datasets.register_ov_dataset."
        )
    return kind


def validation_set_of(name: str) -> str:
    """The data set that settings are chosen on in place of a held-out test set; "" for any other name."""
    return MetadataCatalog.get(name).get("ov_validation_set", "") if name in DatasetCatalog.list() else ""


def require_choice_allowed(name: str, what: str) -> None:
    """Refuse to choose settings on a held-out test set.

    Args:
        name: of a data set.
        what: what chooses, the start of the message.

    Raises:
        UsageError: it is held out.
    """
    if validation_set := validation_set_of(name):
        raise UsageError(
            f"{what} {name}, which is held out for final tables: what is compared on it would be chosen on it. "
            f"Use {validation_set}."
        )


def split_of(name: str) -> Split | None:
    """The :class:`~ovdet2.data.datasets.coco_json.Split` of a registered data set.

    None for a data set that ovdet2 has not registered, and for one of captions.

    Raises:
        DataError: its json, which defines the split, is missing or damaged.
    """
    resolve = MetadataCatalog.get(name).get("ov_split")
    return None if resolve is None else resolve()


def require_names(names: object, what: str) -> None:
    """Require a list of class names.

    Args:
        names: value from a configuration or a call.
        what: its name in messages.

    Raises:
        UsageError: it is no list, or holds what is not text: yaml reads 02146, no, 1.5 and ~ as other values.
    """
    if not isinstance(names, (list, tuple)):
        example = [names] if isinstance(names, str) else ["cat", "dog"]
        raise UsageError(f"{what} is {names!r}: give a list of class names, such as {example}.")
    odd = [name for name in names if not isinstance(name, str)]
    if odd:
        raise UsageError(
            f"{what} holds {first_few(odd)}, no text: yaml turns names such as 02146, no or 1.5 into numbers, booleans and "
            "others: quote it, for example '02146'."
        )


def split_by_names(
    title: str, base_names: Sequence[str], novel_names: Sequence[str], categories: list[dict[str, Any]], source: Any
) -> Split:
    """The split of a json with given base and novel class names.

    Args:
        title: name of the split in reports.
        base_names, novel_names: class names, in the order of the contiguous ids.
        categories: category records of the json.
        source: name of the json in error messages.

    Raises:
        UsageError: a name the json does not have, or has twice; or a name in both lists.
    """
    ids: dict[Any, list[Any]] = {}  # name -> ids, as the json has them
    for category in classes_of(categories):
        if isinstance(category.get("name"), str):
            ids.setdefault(category["name"], []).append(category.get("id"))
    wanted = (*base_names, *novel_names)
    absent = [name for name in wanted if name not in ids]
    if absent:
        raise UsageError(
            f"{source} has no category named {first_few(absent)}; it has {first_few(sorted(ids)) or 'no named one'}: "
            "give the names exactly as in the json."
        )
    twice = [name for name in wanted if len(ids[name]) > 1]
    if twice:
        shown = ", ".join(f"{name!r} (ids {first_few(ids[name])})" for name in twice[:5])
        raise UsageError(f"{source} has several categories named {shown}: rename them in the json.")
    base, novel = (tuple((ids[name][0], name) for name in names) for names in (base_names, novel_names))
    return Split(title, base, novel)


def all_novel(title: str, categories: list[dict[str, Any]], source: Any) -> Split:
    """The split of a transfer target: every class of the json, by ascending id, is novel."""
    return _one_sided(title, categories, source, novel=True)


def all_base(title: str, categories: list[dict[str, Any]], source: Any) -> Split:
    """The split of a closed set: every class of the json, by ascending id, is base."""
    return _one_sided(title, categories, source, novel=False)


def _one_sided(title, categories, source, novel):
    try:
        pairs = tuple(sorted((category["id"], category["name"]) for category in classes_of(categories)))
        return Split(title, () if novel else pairs, pairs if novel else ())
    except (KeyError, TypeError, UsageError) as error:
        raise DataError(f"{source} has a category without id or name, or listed twice ({error}): repair it.") from None


def _require_pseudo_labels_allowed(name, data, json_path, pseudo_labels):
    """Refuse pseudo labels, which a detector made from the names of novel classes, unless they are allowed.

    Raises:
        DataError: the json holds pseudo labels, and the data set is registered without ``pseudo_labels``.
    """
    info = data.get("info")
    made = info.get("pseudo_labels") if isinstance(info, dict) else None
    if made and not pseudo_labels:
        made = made if isinstance(made, dict) else {}
        raise DataError(
            f"{json_path} holds {made.get('annotations', 'some')} pseudo labels, made with the names of novel classes "
            f"({first_few(list(made.get('words') or ['unknown']))}): a detector trained on them has seen those names. If that is "
            f"intended, register {name} with pseudo_labels: True."
        )


def _image_counts(records, split):
    counts = [0] * len(split.names)
    for record in records:
        for category in {annotation["category_id"] for annotation in record["annotations"]}:
            counts[category] += 1
    return counts


def require_free(name: str) -> None:
    """Raise UsageError if a data set of that name is registered."""
    if name in DatasetCatalog.list():
        raise UsageError(f"a data set named {name!r} is registered already: choose another name.")


def resolve(path: Location) -> Path:
    """A relative path below the current :func:`data_root`; an absolute one unchanged."""
    return data_root() / (path() if callable(path) else path)


def existing(
    name: str, files: Callable[[], tuple[Path, ...]], prepare: Callable[[], object] | None, remedy: str
) -> tuple[Path, ...]:
    """Prepare a data set and return its files.

    Raises:
        DataError: one is missing; the message ends with ``remedy``.
    """
    if prepare is not None:
        prepare()
    for path in files():
        if not path.exists():
            raise DataError(f"data set {name!r}: {path} does not exist. Remedy: {remedy}.")
    return files()


def class_metadata(split: Split) -> dict[str, Any]:
    """The entries of Detectron2's Metadata for the classes of a split."""
    return {
        "thing_classes": list(split.names),
        "thing_dataset_id_to_contiguous_id": split.id_to_contiguous,
    }


def stamp_of(name: str, json_path: Path) -> tuple[str, str, int, int]:
    """Identifies the current version of a data set's json: name, path, time of last change, size."""
    state = json_path.stat()
    return name, str(json_path), state.st_mtime_ns, state.st_size


def remember_split(stamp: tuple[str, str, int, int], split: Split) -> None:
    """Store the split that a json defines, by its :func:`stamp_of`, so that the json is not read again for it."""
    _SPLITS[stamp] = split


def split_of_json(name: str, json_path: Path, read_split: ReadSplit, read: Callable[[Path], dict[str, Any]]) -> Split:
    """The split that a json defines; ``read`` reads the json the first time."""
    stamp = stamp_of(name, json_path)
    if stamp not in _SPLITS:
        _SPLITS[stamp] = read_split(read(json_path)["categories"], json_path)
    return _SPLITS[stamp]
