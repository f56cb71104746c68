"""Repair a checked json: make a copy with every fault fixed that has one possible repair, and list all changes.

What converts without loss is converted. A fault of an optional field costs the field, never the box.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ovdet2.data.datasets.check import is_lvis
from ovdet2.data.datasets.check_images import header_sizes, with_slashes
from ovdet2.data.datasets.conversion import convert
from ovdet2.data.datasets.findings import KINDS, Finding, show, usable_id
from ovdet2.data.datasets.validity import (
    FLAGS,
    NEGATIVE,
    NOT_EXHAUSTIVE,
    as_id,
    image_name,
    is_area,
    is_flag,
    is_id,
    is_polygon,
    size_of,
)
from ovdet2.errors import DataError, counted

# Suspicion -> findings that it explains. They are not repaired: removing or clipping these boxes would lose data that
# one edit of the file (converting the boxes, renumbering the categories) can save.
_EXPLAINED = {
    "suspected-xyxy": {"box-outside", "box-partly-outside", "area"},
    "suspected-centres": {"box-outside", "box-partly-outside", "area"},
    "suspected-shares": {"box-outside", "box-partly-outside", "box-empty", "area"},
    "suspected-shift": {"category-unknown", "federated-unknown", "federated-negative"},
}


class Change(NamedTuple):
    """One change of a repair.

    Attributes:
        kind: of the finding that the change repairs.
        where: the record, such as "annotation 11".
        done: the change in words.
    """

    kind: str
    where: str
    done: str


def repair(
    data: Mapping[str, Any],
    findings: Sequence[Finding],
    image_root: str | Path | None = None,
    lvis: bool | None = None,
) -> tuple[dict[str, Any], list[Change]]:
    """Repair the findings of a check.

    What converts without loss is converted. Invalid records are removed, and annotations with their image;
    invalid optional fields are removed from their record. A box that extends beyond its image is clipped; its
    segmentation stays. A missing image size is taken from the image file. Not repaired are findings whose Kind has no ``fix``, and boxes and category ids that a suspicion
    about the file explains. If the removal of faulty records removes all fields by which LVIS is recognised, images get
    "file_name", so that readers still find them.

    Args:
        data: parsed json; not changed.
        findings: of :func:`ovdet2.data.datasets.check.check` on it.
        image_root: of that check; None: missing image sizes are left.
        lvis: of that check.

    Returns:
        (repaired, changes): a json that shares unchanged records with ``data``, and the list of :class:`Change`.

    Raises:
        DataError: no image would be left.
    """
    lvis = is_lvis(data) if lvis is None else lvis
    data, changes = convert(data)[0], []
    suspected = {finding.kind for finding in findings} & _EXPLAINED.keys()
    explained = set().union(*(_EXPLAINED[kind] for kind in suspected))
    todo = {"category": {}, "image": {}, "annotation": {}}  # of each: index -> findings
    for finding in findings:
        kind = KINDS[finding.kind]
        if kind.fix and finding.kind not in explained and not finding.kind.endswith("-type"):
            todo[kind.of].setdefault(finding.index, []).append(finding)
    for finding in findings:
        if finding.kind.endswith("-type"):
            changes.append(Change(finding.kind, finding.where, finding.detail))
    categories = list(_without_removed(data["categories"], todo["category"], changes).values())
    images = _without_removed(data["images"], todo["image"], changes)
    if not images:
        raise DataError("the repaired file would have no image left: check the image folder, and the file.")
    _repair_images(images, todo["image"], lvis, image_root, changes)
    annotations = _repair_annotations(data["annotations"], images.values(), todo, changes)
    _repair_federated(images, annotations, {category["id"] for category in categories}, todo["image"], changes)
    repaired = {**data, "images": list(images.values()), "annotations": annotations, "categories": categories}
    if lvis and not is_lvis(repaired):
        _set_file_names(repaired, changes)
    return repaired, changes


def losses(data: Mapping[str, Any], repaired: Mapping[str, Any], findings: Sequence[Finding]) -> list[str]:
    """What a repair has lost most of: images, annotations, or the annotations of a category; one text for each.

    A repair that removes most of something has seldom found accidents: the file has another fault, or is another file.

    Args:
        data: the json before the repair.
        repaired, findings: of :func:`repair`. A record that stands in ``data`` twice counts once.
    """
    before, copies = convert(data)[0], {}
    for finding in findings:
        if finding.kind.endswith("-copy"):
            copies.setdefault(KINDS[finding.kind].of, set()).add(finding.index)
    lost = []
    for of, key in (("image", "images"), ("annotation", "annotations")):
        count, left = len(before[key]) - len(copies.get(of, ())), len(repaired[key])
        if 2 * left < count:
            lost.append(f"{left:,} of {counted(count, of)} left")
    names = {as_id(entry.get("id")): entry.get("name") for entry in before["categories"] if isinstance(entry, dict)}
    kept = Counter(entry["category_id"] for entry in repaired["annotations"])
    entries = (entry for index, entry in enumerate(before["annotations"]) if index not in copies.get("annotation", ()))
    used = Counter(as_id(entry.get("category_id")) for entry in entries if isinstance(entry, dict))
    for category_id, count in used.items():
        if category_id is not None and 2 * kept[category_id] < count:
            name = f" ({show(names[category_id])})" if category_id in names else ""
            lost.append(f"{kept[category_id]:,} of {counted(count, 'annotation')} of category {category_id}{name} left")
    return lost


def clip_box(box: Sequence[float], size: tuple[float, float]) -> list[float]:
    """Clip a box that overlaps its image to the image, along each axis on which it extends beyond it.

    Args:
        box: (x, y, width, height) in pixels, finite, of positive width and height.
        size: (width, height) of the image.

    Returns:
        [x, y, width, height], of positive width and height.
    """
    clipped = list(box)
    for axis in (0, 1):
        start, end = box[axis], box[axis] + box[axis + 2]
        if start < 0 or end > size[axis]:
            clipped[axis] = max(start, 0)
            clipped[axis + 2] = min(end, size[axis]) - clipped[axis]
    return clipped


def _removal(findings):
    """The first finding whose repair is to remove the record, or None."""
    return next((finding for finding in findings if KINDS[finding.kind].fix.startswith("removed")), None)


def _without_removed(records, todo, changes):
    """{index: record} of the records that are not removed."""
    kept = {}
    for index, record in enumerate(records):
        reason = _removal(todo.get(index, ()))
        if reason is None:
            kept[index] = record
        else:
            changes.append(Change(reason.kind, reason.where, "removed"))
    return kept


def _repair_images(images, todo, lvis, image_root, changes):
    """Write file names with slashes, and sizes from the image files; replaces images in the dict {index: image}."""
    for kind in ("image-backslash", "image-size"):
        found = [finding for index in sorted(todo) for finding in todo[index] if finding.kind == kind]
        found = [finding for finding in found if finding.index in images]
        sizes = {}
        if kind == "image-size" and image_root is not None and found:
            sizes = header_sizes([images[finding.index] for finding in found], lvis, image_root)
        for number, finding in enumerate(found):
            image = images[finding.index]
            if kind == "image-backslash":
                keys = ("file_name", "coco_url") if lvis else ("file_name",)
                repaired = {key: with_slashes(image[key]) for key in keys if isinstance(image.get(key), str)}
            elif number in sizes:
                repaired = dict(zip(("width", "height"), sizes[number]))
            else:
                continue
            changes.append(Change(kind, finding.where, _describe(image, repaired)))
            images[finding.index] = {**image, **repaired}


def _repair_annotations(annotations, images, todo, changes):
    sizes = {}
    for image in images:
        sizes.setdefault(image["id"], size_of(image) or (math.inf, math.inf))
    removals = (_removal(findings) for findings in todo["image"].values())
    orphaned = {finding.id: finding for finding in removals if finding is not None and finding.id not in sizes}
    ids = [usable_id(annotation) for annotation in annotations if isinstance(annotation, dict)]
    # New ids are above all others: an unused lower id may be of an annotation removed on purpose (novel classes).
    new_ids = itertools.count(1 + max((number for number in ids if number is not None), default=0))
    kept = []
    for index, annotation in enumerate(annotations):
        findings = todo["annotation"].get(index, ())
        reason = _removal(findings) or orphaned.get(annotation["image_id"])
        if reason is not None:
            where = findings[0].where if findings else f"annotation {annotation['id']}"
            changes.append(Change(reason.kind, where, "removed"))
            continue
        for finding in findings:
            repaired = _repair_annotation(annotation, finding.kind, sizes[annotation["image_id"]], new_ids)
            changes.append(Change(finding.kind, finding.where, _describe(annotation, repaired)))
            gone = [key for key, value in repaired.items() if value is None]
            annotation = {key: value for key, value in {**annotation, **repaired}.items() if key not in gone}
        kept.append(annotation)
    return kept


def _repair_annotation(annotation, kind, size, new_ids):
    """The repaired fields of an annotation for one kind of finding, as {name: value}; None for a removed field."""
    if kind in ("annotation-id", "annotation-conflict"):
        return {"id": next(new_ids)}
    if kind == "box-partly-outside":
        return {"bbox": clip_box(annotation["bbox"], size)}
    if kind == "annotation-flag":
        return {key: None for key in FLAGS if key in annotation and not is_flag(annotation[key])}
    if kind == "segmentation":
        return {"segmentation": None}
    if kind == "polygon":
        return {"segmentation": [polygon for polygon in annotation["segmentation"] if is_polygon(polygon, size)]}
    area = annotation["bbox"][2] * annotation["bbox"][3]
    return {"area": area if is_area(area, size) else None}


def _repair_federated(images, annotations, category_ids, todo, changes):
    """Remove ids from the federated lists of LVIS; replaces images in the dict {index: image}."""
    present = {images[index]["id"]: [] for index in todo if index in images}
    for annotation in annotations:
        if annotation["image_id"] in present:
            present[annotation["image_id"]].append(annotation["category_id"])
    for index in sorted(images.keys() & todo.keys()):
        image = images[index]
        federated = [finding for finding in todo[index] if finding.kind.startswith("federated-")]
        for finding in {finding.kind: finding for finding in federated}.values():
            repaired = _without_ids(image, finding.kind, category_ids, present[image["id"]])
            if repaired:
                changes.append(Change(finding.kind, finding.where, _describe(image, repaired)))
                image = {**image, **repaired}
        images[index] = image


def _set_file_names(data, changes):
    """Set "file_name" from "coco_url": a json that is no longer recognised as LVIS is read by "file_name" only."""
    for position, image in enumerate(data["images"]):
        repaired = {"file_name": image_name(image, lvis=True)}
        if repaired["file_name"] != image.get("file_name"):
            changes.append(Change("image-name", f"image {image['id']}", _describe(image, repaired)))
            data["images"][position] = {**image, **repaired}


def _without_ids(image, kind, category_ids, present):
    """The lists of an LVIS image that one kind of finding shortens, as {name: list}."""
    lists = {key: image[key] for key in (NEGATIVE, NOT_EXHAUSTIVE) if isinstance(image.get(key), list)}
    if kind == "federated-unknown":
        kept = {key: [value for value in ids if is_id(value) and value in category_ids] for key, ids in lists.items()}
    else:
        contradicting = present if kind == "federated-negative" else image[NOT_EXHAUSTIVE]
        kept = {NEGATIVE: [value for value in lists[NEGATIVE] if value not in contradicting]}
    return {key: ids for key, ids in kept.items() if ids != lists[key]}


def _describe(record, repaired):
    return ", ".join(
        f"{key} {show(record.get(key))} " + ("removed" if value is None else f"-> {show(value)}")
        for key, value in repaired.items()
    )
