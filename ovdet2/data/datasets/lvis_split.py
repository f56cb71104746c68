"""OV-LVIS: the base / novel split that an LVIS json of any version defines, and its training file.

LVIS calls a class rare ("r"), common ("c") or frequent ("f") by the number of its training images: up to 10, up to 100,
more. In open-vocabulary detection the rare classes are novel (ViLD, Gu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovdet2.data.datasets.coco_json import Split, filter_coco_json, first_few, require_ids, require_lists
from ovdet2.data.datasets.prepare import Official, check_counts, read_annotations, source_of, write_prepared
from ovdet2.data.datasets.validity import as_id, classes_of
from ovdet2.errors import DataError

_NOT_LVIS = "use an annotation file of lvisdataset.org (datasets/README.md)"


def frequency_split(categories: Sequence[Mapping[str, Any]], source: str | Path = "the annotation json") -> Split:
    """The split of an LVIS json: frequent and common classes are base, rare ones novel.

    Args:
        categories: its category records, in any order.
        source: name of the json in error messages.

    Returns:
        Base and novel each by ascending category id, with the groups "r", "c" and "f".

    Raises:
        DataError: a category without id, name or frequency, a repeated id or name, or no base class.
    """
    strange = [
        category.get("id")
        for category in categories
        if as_id(category.get("id")) is None
        or not isinstance(category.get("name"), str)
        or category.get("frequency") not in ("f", "c", "r")
    ]
    if strange:
        raise DataError(
            f"{source} has categories without id, name or frequency f, c or r, id {first_few(strange)}: {_NOT_LVIS}."
        )
    categories = classes_of(categories)
    base, novel = (
        tuple(sorted((category["id"], category["name"]) for category in categories if category["frequency"] in kinds))
        for kinds in ("fc", "r")
    )
    if not base:
        raise DataError(f"{source} has no frequent and no common class, so no base class: {_NOT_LVIS}.")
    groups = {
        kind: tuple(sorted(category["id"] for category in categories if category["frequency"] == kind))
        for kind in "rcf"
    }
    try:
        return Split(f"OV-LVIS {len(base)}/{len(novel)}", base, novel, groups)
    except ValueError as error:
        raise DataError(f"{source}: {error}") from None


def closed_set_split(categories: Sequence[Mapping[str, Any]], source: str | Path = "the annotation json") -> Split:
    """The split of a closed set: every class is base, by ascending id, with the groups "r", "c" and "f".

    Args and errors are those of :func:`frequency_split`.
    """
    split = frequency_split(categories, source)
    base = tuple(sorted((*split.base, *split.novel)))
    return Split(f"LVIS, {len(base)} classes, closed set", base, (), split.groups)


def filter_lvis_json(
    data: Mapping[str, Any], split: Split, source: str | Path = "the annotation json"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Remove the labels of novel classes from an LVIS training json.

    Annotations of novel classes are dropped; all images and all categories stay. Novel ids are removed from
    "neg_category_ids", the classes verified to be absent from an image: a federated loss lowers the scores of these
    classes, so it would train on novel names and on image-level labels of them. "not_exhaustive_category_ids" stay,
    because they only exempt a class from being a negative. The input is not changed.

    Args:
        data: parsed LVIS json.
        split: its :func:`frequency_split`.
        source: name of the json in error messages.

    Returns:
        (filtered, report): the new json (annotation records shared with ``data``), and the report of
        :func:`~ovdet2.data.datasets.coco_json.filter_coco_json` with "base_annotations" (including those dropped
        because their box has no area), "base_classes", "novel_classes" and "negatives_masked" (number of novel ids
        removed from "neg_category_ids").

    Raises:
        DataError: an image without one of the two federated lists, or faults of the three lists of COCO.
    """
    novel = {category_id for category_id, _ in split.novel}
    filtered, report = filter_coco_json(data, split.category_ids[: len(split.base)], "all", source)
    lacking = [
        image.get("id")
        for image in data["images"]
        if not {"neg_category_ids", "not_exhaustive_category_ids"} <= image.keys()
    ]
    if lacking:
        raise DataError(
            f"{source} has images without neg_category_ids or not_exhaustive_category_ids, id {first_few(lacking)}: "
            f"{_NOT_LVIS}."
        )
    filtered["categories"] = data["categories"]
    filtered["images"] = [
        {**image, "neg_category_ids": [negative for negative in image["neg_category_ids"] if negative not in novel]}
        for image in data["images"]
    ]
    report |= {
        "categories": len(data["categories"]),
        "base_annotations": report["annotations"] + len(report["degenerate"]),
        "base_classes": len(split.base),
        "novel_classes": len(split.novel),
        "negatives_masked": sum(
            negative in novel for image in data["images"] for negative in image["neg_category_ids"]
        ),
    }
    return filtered, report


def prepare_lvis_train(
    source: str | Path, target: str | Path, remedy: str, official: Official | None = None
) -> tuple[Split, dict[str, Any]]:
    """Write the training file of OV-LVIS.

    Args:
        source: LVIS training json.
        target: file to write; one with the right content is left as it is, another is replaced atomically.
        remedy: what the user should do when ``source`` is missing.
        official: its published counts, if any.

    Returns:
        (split, report): :func:`frequency_split`; the report of :func:`filter_lvis_json` with "written" and "verdict".

    Raises:
        DataError: ``source`` is missing, damaged, not of LVIS, or has the size of the official file but other counts.
    """
    data = read_annotations(source, remedy)
    require_lists(data, source)
    split = frequency_split(data["categories"], source)
    data, report = filter_lvis_json(data, split, source)
    report["verdict"] = check_counts(report, source, official)
    return split, write_prepared(Path(target), data, report, split, source_of(source))


def check_lvis_test(source: str | Path, split: Split, remedy: str, official: Official | None = None) -> dict[str, Any]:
    """Check that an LVIS test json, which is used unchanged, has the classes of the training file; count it.

    Args:
        source: LVIS json with base and novel annotations.
        split: :func:`frequency_split` of the training json.
        remedy: what the user should do when ``source`` is missing.
        official: as of :func:`prepare_lvis_train`.

    Returns:
        The counts "images_read", "annotations_read" and "novel_annotations", and "verdict".

    Raises:
        DataError: ``source`` is missing, damaged, or has other base or novel classes.
    """
    data = read_annotations(source, remedy)
    require_lists(data, source)
    require_ids(data, source)
    found = frequency_split(data["categories"], source)
    differing = sorted({*found.base} ^ {*split.base} | {*found.novel} ^ {*split.novel})
    if differing:
        raise DataError(
            f"{source} has other classes, or other rare classes, than the training file: {first_few(differing)}. "
            "Use both of one version of LVIS."
        )
    novel = {category_id for category_id, _ in split.novel}
    report = {
        "images_read": len(data["images"]),
        "annotations_read": len(data["annotations"]),
        "novel_annotations": sum(annotation.get("category_id") in novel for annotation in data["annotations"]),
    }
    return {**report, "verdict": check_counts(report, source, official)}
