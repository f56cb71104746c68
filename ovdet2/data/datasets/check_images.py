"""Check the image files of a json: that each exists within the image root, can be read, and has the stated size."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ovdet2.data.datasets.findings import Finding, finding_of, printable, show, show_field
from ovdet2.data.datasets.validity import image_name, leaves_folder, size_of
from ovdet2.errors import DataError
from ovdet2.io.images import image_size, read_image
from ovdet2.io.progress import progress_bar


def header_sizes(records: Sequence[Any], lvis: bool, image_root: str | Path) -> dict[int, tuple[int, int]]:
    """{index: (width, height)} from the image file, of the records that state no valid size; files that can be read.

    Args:
        records, lvis, image_root: as of :func:`check_images`.
    """
    sizes, root = {}, os.path.realpath(image_root)
    for index, image in enumerate(records):
        if isinstance(image, dict) and size_of(image) is None and name_fault(image, lvis) is None:
            name = image_name(image, lvis)
            if _file_fault((root, name, None, False)) is None:
                sizes[index] = image_size(os.path.join(root, str(name)))
    return sizes


def check_images(
    records: Sequence[Any], lvis: bool, image_root: str | Path, decode: bool = False, workers: int = 1
) -> list[Finding]:
    """Compare the image files with their records.

    Args:
        records: the json's "images".
        lvis: whether they are named as in LVIS, see :func:`~ovdet2.data.datasets.validity.image_name`.
        image_root, decode, workers: as of :func:`ovdet2.data.datasets.check.check`.

    Returns:
        In the order of ``records``.

    Raises:
        DataError: ``image_root`` is no folder.
    """
    if not os.path.isdir(image_root):
        raise DataError(f"{image_root} is not a folder: give the folder that the file names are relative to.")
    root = os.path.realpath(image_root)
    named = [(index, image) for index, image in enumerate(records) if isinstance(image, dict)]
    named = [(index, image) for index, image in named if name_fault(image, lvis) is None]
    jobs = [(root, image_name(image, lvis), size_of(image), decode) for _, image in named]
    found = []
    with contextlib.ExitStack() as stack:
        run = map
        if workers > 1:
            pool = stack.enter_context(ProcessPoolExecutor(workers, multiprocessing.get_context("fork")))
            run = functools.partial(pool.map, chunksize=32)
        faults = progress_bar(run(_file_fault, jobs), total=len(jobs), desc="reading images", unit="image", leave=False)
        for (index, image), fault in zip(named, faults):
            if fault is not None:
                found.append(finding_of(fault[0], index, image, fault[1]))
    return found


def _file_fault(job):
    """(kind, detail) of what is wrong with an image file, or None. ``job``: real root, name, (W, H) or None, decode."""
    root, name, size, decode = job
    try:
        path = os.path.realpath(os.path.join(root, name))
        if os.path.commonpath([root, path]) != root:
            return (
                "image-escape",
                f"{show(name)} is a link to a file outside of the image folder: copy the file, or name its real folder",
            )
        if not os.path.isfile(path):
            return _missing(root, name)
        height, width = read_image(path).shape[:2] if decode else image_size(path)[::-1]
    except DataError as error:
        return "image-unreadable", printable(str(error))
    except (OSError, ValueError) as error:  # an invalid file name: too long, or with a null character
        return "image-missing", printable(f"{show(name)}: {error}")
    if size is not None and (width, height) != size:
        return "image-mismatch", f"the file is {width}x{height} (upright), the json states {size[0]}x{size[1]}"
    return None


def _missing(root, name):
    """The finding of a missing file; a name with backslashes, as Windows has them, may name a file with slashes."""
    if "\\" not in name:
        return "image-missing", show(name)
    slashed = with_slashes(name)
    path = os.path.realpath(os.path.join(root, slashed))
    if not leaves_folder(slashed) and os.path.commonpath([root, path]) == root and os.path.isfile(path):
        return "image-backslash", f"{show(name)}: write {show(slashed)}"
    return "image-missing", f"{show(name)}, which has backslashes: write slashes between folders"


def with_slashes(name: str) -> str:
    """A file name with slashes in place of backslashes."""
    return name.replace("\\", "/")


def name_fault(image: Mapping[str, Any], lvis: bool) -> tuple[str, str] | None:
    """(kind, detail) of what is wrong with the file name of an image record, or None."""
    name = image_name(image, lvis)
    if name is None:
        return "image-name", show_field(image, "file_name")
    for given in (name, image.get("file_name")):  # in LVIS "coco_url" has precedence, but other readers use file_name
        if isinstance(given, str) and leaves_folder(given):
            return "image-escape", show(given)
    return None
