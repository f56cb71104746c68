"""Check a COCO- or LVIS-format json and its images: report every problem by kind and id.

The json is not trusted: any value may be of any type, and no file outside of the image root is opened. What is valid
is defined in :mod:`ovdet2.data.datasets.validity`, which the loader uses too: what passes here loads, maps and is
evaluated. :mod:`ovdet2.data.datasets.repair` repairs the problems that have only one possible repair.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ovdet2.data.datasets.check_images import check_images, header_sizes, name_fault
from ovdet2.data.datasets.conversion import convert
from ovdet2.data.datasets.findings import (
    KINDS,
    LISTS,
    NOTES,
    Finding,
    finding_of,
    show,
    show_field,
    usable_id,
)
from ovdet2.data.datasets.suspicions import suspect_boxes, suspect_shift
from ovdet2.data.datasets.validity import (
    FLAGS,
    MIN_BOX_SIDE,
    NEGATIVE,
    NOT_EXHAUSTIVE,
    NOT_FINITE,
    NOT_NUMBERS,
    TOLERANCE,
    box_fault,
    image_name,
    is_area,
    is_crowd,
    is_flag,
    is_id,
    is_name,
    is_polygon,
    is_root_category,
    segmentation_fault,
    size_of,
)
from ovdet2.errors import DataError
from ovdet2.io.progress import progress_bar
from ovdet2.vocabulary.templates import clean_name

_MOSTLY = 0.5  # share of the annotations of a class
_SOME = 2  # fewer annotations of a class are no habit


def check(
    data: Any,
    source: str | Path,
    image_root: str | Path | None = None,
    decode: bool = False,
    workers: int = 1,
    masks: bool = False,
    lvis: bool | None = None,
) -> list[Finding]:
    """Check a json and, with ``image_root``, its image files.

    Args:
        data: parsed json; not changed.
        source: its path, for error messages.
        image_root: folder that the file names are relative to, or None to check no image file.
        decode: decode every image completely, which finds truncated ones; otherwise only headers are read.
        workers: processes that read images; the findings do not depend on their number.
        masks: every annotation must have a mask, as a data set that is registered with ``masks`` requires.
        lvis: the json is read by the rules of LVIS (metric "ov_lvis"); None: if it has fields of LVIS.

    Returns:
        All findings, in the order of KINDS, then of the json.

    Raises:
        DataError: ``data`` is no object with the three lists of the format, or ``image_root`` is no folder.
    """
    _require_lists(data, source)
    lvis = is_lvis(data) if lvis is None else lvis
    data, found = convert(data)
    sizes = {} if image_root is None else header_sizes(data["images"], lvis, image_root)
    _check_records(data, masks, lvis, sizes, found)
    if image_root is not None:
        found += check_images(data["images"], lvis, image_root, decode, workers)
    return sorted(found, key=_order)


def problems(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are problems: without the kinds of NOTES, which only inform."""
    return [finding for finding in findings if finding.kind not in NOTES]


def is_lvis(data: Mapping[str, Any]) -> bool:
    """Whether a json is in LVIS format: one of its images or categories has a field of that format."""
    return any(
        isinstance(record, dict) and not fields.isdisjoint(record)
        for key, fields in (("images", {NEGATIVE, NOT_EXHAUSTIVE}), ("categories", {"frequency"}))
        for record in data[key]
    )


def check_json(data: Any, source: str | Path, masks: bool = False, lvis: bool | None = None) -> list[Finding]:
    """Check a json without its image files; arguments, result and errors as of :func:`check`."""
    return check(data, source, masks=masks, lvis=lvis)


def _check_records(data, masks, lvis, sizes, found):
    """Append the findings in the json; ``sizes`` of the images without a valid size, as of :func:`header_sizes`."""
    category_ids = _check_categories(data["categories"], lvis, found)
    images = _check_image_records(data["images"], category_ids, lvis, sizes, found)
    if not images or not category_ids:
        found.append(Finding("file-empty", None, None, f"{len(images)} images, {len(category_ids)} categories"))
    annotated, used = _check_annotations(data["annotations"], images, category_ids, masks, found)
    for image_id, image in images.items():
        if image_id not in annotated:
            found.append(Finding("image-without-annotations", image_id, image.index, ""))
    _check_names(data["categories"], used, images, found)


def _require_lists(data, source):
    for key in LISTS.values():
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"{source} has no list {key!r}: it is not a COCO or LVIS instances json; check the file.")


def _identified(records, of, found):
    """Yield (index, record, id or None) of the records that are objects; report other records and faulty ids."""
    first = {}
    for index, record in enumerate(progress_bar(records, desc=f"checking {LISTS[of]}", unit=of, leave=False, delay=1)):
        if not isinstance(record, dict):
            found.append(Finding(f"{of}-record", None, index, show(record)))
            continue
        record_id = usable_id(record)
        if record_id is None:
            found.append(Finding(f"{of}-id", None, index, show_field(record, "id")))
        else:
            earlier = first.setdefault(record_id, index)
            if earlier != index:
                kind = "copy" if records[earlier] == record else "conflict"
                found.append(Finding(f"{of}-{kind}", record_id, index, f"number {index} and {earlier} of the list"))
        yield index, record, record_id


def _check_categories(records, lvis, found):
    """The set of category ids."""
    category_ids = set()
    for index, category, category_id in _identified(records, "category", found):
        if category_id is not None:
            category_ids.add(category_id)
        if not is_name(category.get("name")):
            found.append(finding_of("category-name", index, category, show_field(category, "name")))
        if lvis and category.get("frequency") not in ("r", "c", "f"):
            found.append(finding_of("category-frequency", index, category, show_field(category, "frequency")))
    return category_ids


def _check_names(records, used, images, found):
    """Report categories of one name, as a detector reads names: "Plum" and "plum" are one word.

    Args:
        used: {category id: number of its annotations}.
    """
    named = {}  # word -> (index, id) of the first category
    categories = [category for category in records if isinstance(category, dict)]
    listed = {category_id for image in images.values() for category_id in image.listed}
    for index, category in enumerate(records):
        name = category.get("name") if isinstance(category, dict) else None
        category_id = usable_id(category) if isinstance(category, dict) else None
        if not is_name(name) or category_id is None:
            continue
        if not used[category_id] and category_id not in listed and is_root_category(category, categories):
            found.append(finding_of("category-root", index, category, show_field(category, "name")))
            continue
        first = named.setdefault(clean_name(name), (category_id, name))
        if first[0] != category_id:
            seen = f"{show(name)}, category {first[0]} is {show(first[1])}"
            found.append(finding_of("category-name-twice", index, category, seen))


class _Image(NamedTuple):
    index: int
    size: tuple | None  # (width, height)
    negatives: frozenset  # category ids
    listed: frozenset  # category ids of both lists of LVIS


def _check_image_records(records, category_ids, lvis, sizes, found):
    """Dict of image id to :class:`_Image`; of several images with one id, the first."""
    images, files = {}, {}
    for index, image, image_id in _identified(records, "image", found):
        size = size_of(image)
        if size is None:
            seen = f"{show_field(image, 'width')}, {show_field(image, 'height')}"
            found.append(finding_of("image-size", index, image, seen))
            size = sizes.get(index)
        fault = name_fault(image, lvis)
        if fault is not None:
            found.append(finding_of(fault[0], index, image, fault[1]))
        listed = _check_federated(index, image, category_ids, found) if lvis else {}
        if image_id is None:
            continue
        images.setdefault(
            image_id, _Image(index, size, listed.get(NEGATIVE, frozenset()), frozenset().union(*listed.values()))
        )
        other = files.setdefault(image_name(image, lvis), image_id)
        if fault is None and other != image_id:
            found.append(
                finding_of("image-same-file", index, image, f"{show(image_name(image, lvis))}, of image {other}")
            )
    return images


def _check_federated(index, image, category_ids, found):
    """{list of LVIS: frozenset of its category ids}.

    A not-exhaustive class without a box is no fault: a training file without the boxes of rare classes keeps the list.
    """
    listed = {}
    for key in (NEGATIVE, NOT_EXHAUSTIVE):
        ids = image.get(key)
        if not isinstance(ids, list):
            found.append(finding_of("federated-missing", index, image, show_field(image, key)))
            ids = []
        unknown = [value for value in ids if not (is_id(value) and value in category_ids)]
        if unknown:
            found.append(finding_of("federated-unknown", index, image, f"{key}: {show(unknown)}"))
        listed[key] = frozenset(value for value in ids if is_id(value))
    both = listed[NEGATIVE] & listed[NOT_EXHAUSTIVE]
    if both:
        found.append(finding_of("federated-both", index, image, show(sorted(both))))
    return listed


def _check_annotations(records, images, category_ids, masks, found):
    """(ids of the images that have annotations, a set; Counter of category id to annotations)."""
    annotated, used, crowds, objects = set(), Counter(), Counter(), {}
    boxed, rows = array("q"), array("d")  # indices; and x, y, width, height, image width, image height per index
    for index, annotation, annotation_id in _identified(records, "annotation", found):
        image = images.get(annotation["image_id"]) if is_id(annotation.get("image_id")) else None
        category_id: Any = annotation.get("category_id")
        box: Any = annotation.get("bbox")
        if image is not None:
            annotated.add(annotation["image_id"])
        if is_id(category_id):
            used[category_id] += 1
            crowds[category_id] += is_crowd(annotation)
        for kind, seen in _reference_faults(annotation, images, category_ids):
            found.append(finding_of(kind, index, annotation, seen))
        if image is not None and is_id(category_id) and category_id in category_ids & image.negatives:
            seen = f"category {category_id}, of annotation {annotation_id}"
            found.append(Finding("federated-negative", annotation["image_id"], image.index, seen))
        size = image.size if image is not None else None
        fault = box_fault(box)
        if fault == NOT_NUMBERS or (fault == NOT_FINITE and not _numbers_only(box)):
            found.append(finding_of("annotation-field", index, annotation, show_field(annotation, "bbox")))
        elif fault == NOT_FINITE:
            found.append(finding_of("box-not-finite", index, annotation, show(box)))
        else:
            boxed.append(index)
            rows.extend((*box, *(size or (math.inf, math.inf))))
            if fault is None and image is not None and is_id(category_id):
                same = hash((annotation["image_id"], category_id, *box))  # a number: there may be millions
                first = objects.setdefault(same, annotation_id)
                if first != annotation_id:
                    found.append(finding_of("box-twice", index, annotation, f"{show(box)}, of annotation {first}"))
        for kind, seen in _other_faults(annotation, size, masks):
            found.append(finding_of(kind, index, annotation, seen))
    _check_boxes(records, np.array(boxed), np.array(rows).reshape(-1, 6), found)
    found += suspect_shift(used, category_ids)
    found += _mostly_crowds(used, crowds)
    return annotated, used


def _numbers_only(box):
    return {int, float}.issuperset(map(type, box))


def _reference_faults(annotation, images, category_ids):
    """Yield (kind, detail) of faults of image_id and category_id."""
    for key, known, kind in (
        ("image_id", images, "image-unknown"),
        ("category_id", category_ids, "category-unknown"),
    ):
        if not is_id(annotation.get(key)):
            yield "annotation-field", show_field(annotation, key)
        elif annotation[key] not in known:
            yield kind, show_field(annotation, key)


def _mostly_crowds(used, crowds):
    """Notes for classes that have hardly an object to learn or to find."""
    return [
        Finding("category-mostly-crowds", category_id, None, f"{crowds[category_id]} of {count} annotations")
        for category_id, count in used.items()
        if count >= _SOME and crowds[category_id] > _MOSTLY * count
    ]


def _other_faults(annotation, size, masks):
    """Yield (kind, detail) of faults of the optional fields iscrowd, ignore, area and segmentation."""
    for key in FLAGS:
        if key in annotation and not is_flag(annotation[key]):
            yield "annotation-flag", show_field(annotation, key)
    if "area" in annotation and not is_area(annotation["area"], size):
        yield "area", show_field(annotation, "area")
    segmentation = annotation.get("segmentation")
    if segmentation is None or segmentation == []:  # not given
        if masks:
            yield "mask-missing", show_field(annotation, "segmentation")
        return
    fault = segmentation_fault(segmentation, size)
    if fault is None:
        return
    if isinstance(segmentation, list):
        bad = [position for position, polygon in enumerate(segmentation) if not is_polygon(polygon, size)]
        kind = "polygon" if len(bad) < len(segmentation) else "segmentation"
        yield kind, f"{len(bad)} of {len(segmentation)} polygons, the first is {show(segmentation[bad[0]])}"
    else:
        stated = "of unknown size" if size is None else f"of {size[0]}x{size[1]}"
        yield "segmentation", f"{fault}: {show(segmentation)} in an image {stated}"


def _check_boxes(records, indices, rows, found):
    """Report empty boxes and boxes outside of their image.

    Args:
        indices: array [M], into ``records``, of the annotations with finite boxes.
        rows: array [M, 6]: x, y, width, height in pixels, and the image's width and height, infinite if unknown.
    """
    x, y, width, height, image_width, image_height = rows.T
    with np.errstate(over="ignore"):  # a sum that overflows is outside too
        right, bottom = x + width, y + height
    empty = np.minimum(width, height) < MIN_BOX_SIDE
    outside = ~empty & ((right <= 0) | (bottom <= 0) | (x >= image_width) | (y >= image_height))
    leaves = (np.minimum(x, y) < -TOLERANCE) | (right > image_width + TOLERANCE) | (bottom > image_height + TOLERANCE)
    partly = ~empty & ~outside & leaves
    for kind, mask in (("box-empty", empty), ("box-outside", outside), ("box-partly-outside", partly)):
        for row in np.flatnonzero(mask):
            index = int(indices[row])
            seen = f"{show(records[index]['bbox'])} in an image of {image_width[row]:g}x{image_height[row]:g}"
            found.append(finding_of(kind, index, records[index], seen))
    judged = np.flatnonzero(~empty)
    found += suspect_boxes(rows[judged], [usable_id(records[indices[row]]) for row in judged])


_RANK = {kind: rank for rank, kind in enumerate(KINDS)}


def _order(finding):
    return _RANK[finding.kind], -1 if finding.index is None else finding.index
