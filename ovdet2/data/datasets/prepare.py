"""Prepare the annotation files of a benchmark: filter published files, check their counts, write them atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet2.data.datasets.coco_json import Split, filter_coco_json
from ovdet2.errors import DataError
from ovdet2.io.files import atomic_path, read_json, sha256_file
from ovdet2.io.progress import progress_bar

_SCHEMA = "ovdet2/split-json/1"


@dataclass(frozen=True)
class Official:
    """The size of an official annotation file, and the published counts of the benchmark file made from it.

    Args:
        images, annotations: counts of the official file, by which it is recognised.
        filtered_counts: {key of the report: published count}, such as {"images": 107_761}.
    """

    images: int
    annotations: int
    filtered_counts: Mapping[str, int]


def check_counts(report: Mapping[str, Any], source: str | Path, official: Official | None) -> str:
    """Compare the counts of a prepared file with the published ones; returns the verdict in one sentence.

    Args:
        report: with "images_read", "annotations_read" and the keys of ``official.filtered_counts``.
        source: path of the file that was read.
        official: None if no counts are published.

    Raises:
        DataError: the file has the size of the official one, but its filtered counts differ from the published ones.
    """
    if official is None:
        return "no published counts to compare with"
    if (report["images_read"], report["annotations_read"]) != (official.images, official.annotations):
        return (
            f"not the official file: {report['images_read']:,} images, {report['annotations_read']:,} annotations were "
            f"read, the official one has {official.images:,} and {official.annotations:,}; counts not checked"
        )
    counts = {key: report[key] for key in official.filtered_counts}
    if counts != official.filtered_counts:
        raise DataError(
            f"{source} has the size of the official file, but {_counts(counts)} remain where "
            f"{_counts(official.filtered_counts)} are published: the file was changed, download it again. "
            "Nothing was written."
        )
    return f"as published: {_counts(official.filtered_counts)}"


def prepare_split(
    annotations: str | Path,
    prefix: str,
    split: Split,
    remedy: str = "check the folder",
    official: Mapping[str, Official] | None = None,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write ``<prefix>_train_base.json`` and ``<prefix>_val_all.json`` next to instances_{train,val}2017.json.

    A file that already has the right content is not written; otherwise the new file replaces it atomically.

    Args:
        annotations: folder with instances_train2017.json and instances_val2017.json.
        prefix: "ov_coco", "ov_shapes", ...
        split: of the benchmark.
        remedy: what the user should do when an official file is missing.
        official: published counts by name of the written file, if any.

    Yields:
        (path, report) per file after it is written; report as of ``filter_coco_json`` plus :func:`images_by_status`,
        "written" and "verdict" (of :func:`check_counts`).

    Raises:
        DataError: an official file is missing, damaged or has other category ids, or see :func:`check_counts`.
    """
    base_ids = split.category_ids[: len(split.base)]
    for name, target, category_ids in (
        ("instances_train2017.json", f"{prefix}_train_base.json", base_ids),
        ("instances_val2017.json", f"{prefix}_val_all.json", split.category_ids),
    ):
        source, target = Path(annotations) / name, Path(annotations) / target
        published = (official or {}).get(target.name)
        yield target, prepare_file(source, target, split, category_ids, remedy, published)


def prepare_file(
    source: Path,
    target: Path,
    split: Split,
    category_ids: Sequence[int],
    remedy: str = "check the folder",
    official: Official | None = None,
) -> dict[str, Any]:
    """Write one file of a benchmark; see :func:`prepare_split`.

    Args:
        source: COCO json with all annotations.
        target: file to write.
        split: of the benchmark.
        category_ids: of the classes whose annotations are kept.
        remedy: what the user should do when ``source`` is missing.
        official: published counts of ``target``, if any.

    Returns:
        The report.

    Raises:
        DataError: see :func:`prepare_split`.
    """
    data, report = filter_coco_json(read_annotations(source, remedy), category_ids, source=source)
    report |= images_by_status(data, split)
    report["verdict"] = check_counts(report, source, official)
    return write_prepared(target, data, report, split, source_of(source))


def images_by_status(data: Mapping[str, Any], split: Split) -> dict[str, int]:
    """The counts "base_images" and "novel_images": images with an annotation of a base class, of a novel class.

    An image that has both counts in both, so their sum is above the number of images.
    """
    return {
        f"{status}_images": len({box["image_id"] for box in data["annotations"] if box["category_id"] in category_ids})
        for status, category_ids in (("base", dict(split.base)), ("novel", dict(split.novel)))
    }


def read_annotations(path: str | Path, remedy: str) -> Any:
    """:func:`~ovdet2.io.files.read_json` with a progress line: parsing 1 GB takes half a minute."""
    with progress_bar(desc=f"reading {Path(path).name}", total=1, bar_format="{desc} ...", leave=False):
        return read_json(path, remedy)


def source_of(path: str | Path) -> dict[str, str]:
    """Manifest entries that identify a source file: its name and SHA-256."""
    return {"source": Path(path).name, "source_sha256": sha256_file(path)}


def write_prepared(
    target: Path, data: Mapping[str, Any], report: Mapping[str, Any], split: Split, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Add a manifest to ``data`` and write it to ``target`` atomically, unless the file has that content already.

    The json is encoded record by record, because all of LVIS in one string would need another gigabyte. If ``target``
    exists, the json is first encoded once to compare it.

    Args:
        target: path to write.
        data: COCO or LVIS json; not changed.
        report: with the counts "images", "annotations", "categories" and the list "degenerate".
        split: whose name the manifest holds.
        provenance: further entries of the manifest, such as of :func:`source_of`.

    Returns:
        ``report`` with "written", whether the file was written.

    Raises:
        DataError: no image or no annotation is left. Nothing is written.
    """
    if not data["images"] or not data["annotations"]:
        raise DataError(
            f"{target} would have {len(data['images']):,} images and {len(data['annotations']):,} annotations: nothing was "
            "written. Check that the annotations of the source have the category ids of its categories."
        )
    counts = {key: report[key] for key in ("images", "annotations", "categories", "degenerate")}
    data = {**data, "manifest": {"schema": _SCHEMA, "split": split.name, **provenance, **counts}}
    if target.is_file():
        digest = hashlib.sha256()
        for piece in _pieces(data, f"comparing with {target.name}"):
            digest.update(piece.encode())
        if digest.hexdigest() == sha256_file(target):
            return {**report, "written": False}
    with atomic_path(target) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        handle.writelines(_pieces(data, f"writing {target.name}"))
    return {**report, "written": True}


def summary(target: Path, report: Mapping[str, Any], *details: str) -> str:
    """The lines that a preparation script prints about one file.

    Args:
        target: path of the file.
        report: of :func:`write_prepared`, with "verdict".
        details: lines between the first and the verdict.
    """
    lines = [f"{target}: {'written' if report['written'] else 'already up to date'}", *details, report["verdict"]]
    if report["degenerate"]:
        lines.append(f"dropped zero-area boxes: annotations {', '.join(map(str, report['degenerate']))}")
    return "\n  ".join(lines)


def _pieces(data, description):
    """Yield the text that ``json.dumps`` gives of ``data`` in pieces no longer than a record; shows progress."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    before = "{"
    for key, value in data.items():
        yield f"{before}{encode(key)}: "
        if isinstance(value, list):
            yield "["
            for number, record in enumerate(progress_bar(value, desc=f"{description}, {key}", leave=False, delay=1)):
                yield f"{', ' if number else ''}{encode(record)}"
            yield "]"
        else:
            yield encode(value)
        before = ", "
    yield "}\n"


def _counts(counts):
    return ", ".join(f"{count:,} {key.replace('_', ' ')}" for key, count in counts.items())
