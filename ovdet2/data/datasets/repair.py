"""A cleaned copy of a checked json: what can be mended without a guess is, and every change is told."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ovdet2.data.datasets.check import image_name, is_lvis, is_polygon
from ovdet2.data.datasets.findings import KINDS, NEGATIVE, NOT_EXHAUSTIVE, Finding, is_id, show, usable_id
from ovdet2.errors import DataError

# Findings that follow from a suspicion: removing or clipping those boxes would spoil a file that one edit can mend.
_LEFT_ALONE = {
    "suspected-xyxy": {"box-outside", "box-partly-outside", "area"},
    "suspected-shift": {"category-unknown", "federated-unknown", "federated-negative"},
}


class Change(NamedTuple):
    """One change: the kind of the finding that asked for it, where ("annotation 11"), and what was done."""

    kind: str
    where: str
    done: str


def repair(data: Mapping[str, Any], findings: Sequence[Finding]) -> tuple[dict[str, Any], list[Change]]:
    """Mend what a check found.

    Records go that cannot be right, and annotations with their image; a box that leaves its image is clipped to it, its
    segmentation stays. A finding whose Kind has no ``fix`` is left, and so are boxes and category ids that a suspicion
    about the whole file explains. Images of LVIS whose marks all go with faulty records keep their names.

    Args:
        data: parsed json; not changed.
        findings: of :func:`ovdet2.data.datasets.check.check` on it.

    Returns:
        (repaired, changes): a json that shares unchanged records with ``data``, and what was done.

    Raises:
        DataError: no image would be left.
    """
    suspected = {finding.kind for finding in findings} & _LEFT_ALONE.keys()
    left_alone = set().union(*(_LEFT_ALONE[kind] for kind in suspected))
    todo = {"category": {}, "image": {}, "annotation": {}}  # of each: index -> findings
    for finding in findings:
        kind = KINDS[finding.kind]
        if kind.fix and finding.kind not in left_alone:
            todo[kind.of].setdefault(finding.index, []).append(finding)
    changes = []
    categories = list(_without_removed(data["categories"], todo["category"], changes).values())
    images = _without_removed(data["images"], todo["image"], changes)
    if not images:
        raise DataError("the repaired file would have no image left: check the image folder, and the file.")
    annotations = _mend_annotations(data["annotations"], images.values(), todo, changes)
    _mend_federated(images, annotations, {category["id"] for category in categories}, todo["image"], changes)
    repaired = {**data, "images": list(images.values()), "annotations": annotations, "categories": categories}
    if is_lvis(data) and not is_lvis(repaired):
        _keep_names(repaired, changes)
    return repaired, changes


def clip_box(box: Sequence[float], size: tuple[float, float]) -> list[float]:
    """Clip a box that overlaps its image to it, along each axis on which it leaves; never to nothing.

    Args:
        box: (x, y, width, height) in pixels, finite, of positive width and height.
        size: (width, height) of the image.

    Returns:
        [x, y, width, height].
    """
    clipped = list(box)
    for axis in (0, 1):
        start, end = box[axis], box[axis] + box[axis + 2]
        if start < 0 or end > size[axis]:
            clipped[axis] = max(start, 0)
            clipped[axis + 2] = min(end, size[axis]) - clipped[axis]
    return clipped


def _removal(findings):
    """The first finding whose remedy is to remove the record, or None."""
    return next((finding for finding in findings if KINDS[finding.kind].fix.startswith("removed")), None)


def _without_removed(records, todo, changes):
    """Dict of index to record of those that stay."""
    kept = {}
    for index, record in enumerate(records):
        reason = _removal(todo.get(index, ()))
        if reason is None:
            kept[index] = record
        else:
            changes.append(Change(reason.kind, reason.where, "removed"))
    return kept


def _mend_annotations(annotations, images, todo, changes):
    sizes = {}
    for image in images:
        sizes.setdefault(image["id"], (image["width"], image["height"]))
    removals = (_removal(findings) for findings in todo["image"].values())
    orphaned = {finding.id: finding for finding in removals if finding is not None and finding.id not in sizes}
    ids = [usable_id(annotation) for annotation in annotations if isinstance(annotation, dict)]
    # Not from the gaps: those may be ids of annotations that were left out on purpose, such as novel ones.
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
            mended = _mend(annotation, finding.kind, sizes[annotation["image_id"]], new_ids)
            changes.append(Change(finding.kind, finding.where, _told(annotation, mended)))
            annotation = {**annotation, **mended}
        kept.append(annotation)
    return kept


def _mend(annotation, kind, size, new_ids):
    """The field of an annotation that mends one kind of finding, as {name: value}."""
    if kind in ("annotation-id", "annotation-conflict"):
        return {"id": next(new_ids)}
    if kind == "box-partly-outside":
        return {"bbox": clip_box(annotation["bbox"], size)}
    if kind == "polygon":
        return {"segmentation": [polygon for polygon in annotation["segmentation"] if is_polygon(polygon)]}
    return {"area": annotation["bbox"][2] * annotation["bbox"][3]}


def _mend_federated(images, annotations, category_ids, todo, changes):
    """Take ids out of the lists of LVIS; replaces images in the dict of index to image."""
    present = {images[index]["id"]: [] for index in todo if index in images}
    for annotation in annotations:
        if annotation["image_id"] in present:
            present[annotation["image_id"]].append(annotation["category_id"])
    for index in sorted(images.keys() & todo.keys()):
        image = images[index]
        for finding in {finding.kind: finding for finding in todo[index]}.values():
            mended = _without_ids(image, finding.kind, category_ids, present[image["id"]])
            if mended:
                changes.append(Change(finding.kind, finding.where, _told(image, mended)))
                image = {**image, **mended}
        images[index] = image


def _keep_names(data, changes):
    """Name images as before where all that told of LVIS is gone: as of COCO they are read by "file_name" alone."""
    for position, image in enumerate(data["images"]):
        mended = {"file_name": image_name(image, lvis=True)}
        if mended["file_name"] != image.get("file_name"):
            changes.append(Change("image-name", f"image {image['id']}", _told(image, mended)))
            data["images"][position] = {**image, **mended}


def _without_ids(image, kind, category_ids, present):
    """The lists of an LVIS image that one kind of finding shortens, as {name: list}."""
    lists = {key: image[key] for key in (NEGATIVE, NOT_EXHAUSTIVE) if isinstance(image.get(key), list)}
    if kind == "federated-unknown":
        kept = {key: [value for value in ids if is_id(value) and value in category_ids] for key, ids in lists.items()}
    else:
        contradicting = present if kind == "federated-negative" else image[NOT_EXHAUSTIVE]
        kept = {NEGATIVE: [value for value in lists[NEGATIVE] if value not in contradicting]}
    return {key: ids for key, ids in kept.items() if ids != lists[key]}


def _told(record, mended):
    return ", ".join(f"{key} {show(record.get(key))} -> {show(value)}" for key, value in mended.items())
