"""Predictions of an evaluation on disk: one JSON-lines file per process, merged into one by the first process.

All machines of the run must share the folder. Each file starts with a line holding a token that its writer
also sends to the merging process, so a file left by an earlier run is never taken for one of this run.
"""

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError
from ovdet2.io.files import atomic_path

MERGED = "predictions.jsonl"
_LINE_START = re.compile(rb'\{"image_id": (-?\d+)[,}]')


class PredictionWriter:
    """Writes one process's records, each of one image.

    Args:
        folder: output folder, made when absent.
        rank: number of this process.
        token: of another writer of this process, for a second file of the same run; None: a new one.
    """

    def __init__(self, folder: str | Path, rank: int, token: str | None = None) -> None:
        self.token = token or uuid.uuid4().hex
        path = _rank_path(folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w", encoding="utf-8")
        self._file.write(json.dumps({"token": self.token}) + "\n")

    def write(self, record: dict[str, Any]) -> None:
        """Append one JSON-serialisable dict, whose first entry is "image_id"."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Flush the file to disk and close it; further calls do nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def merge(folder: str | Path, tokens: Sequence[str], image_ids: Iterable[int]) -> Path:
    """Join the files of all processes into ``predictions.jsonl``, by ascending image id, and remove them.

    The result does not depend on which process predicted which image. The lines are copied, not held.

    Args:
        folder: output folder.
        tokens: the writers' tokens, by rank.
        image_ids: the images that must be there, each once.

    Returns:
        Path of the merged file.

    Raises:
        DataError: a process's file is missing or of another run; an image is missing, predicted twice, or unknown.
            The files of the processes are then left as they are.
    """
    expected, places, twice = set(image_ids), {}, set()
    paths = [_rank_path(folder, rank) for rank in range(len(tokens))]
    for path, token in zip(paths, tokens):
        for image_id, place in _index(path, token):
            if image_id in places:
                twice.add(image_id)
            places[image_id] = (path, *place)
    for kind, ids in (
        ("without predictions", expected - places.keys()),
        ("predicted twice", twice),
        ("that are not in the data set", places.keys() - expected),
    ):
        if ids:
            shown = ", ".join(str(image_id) for image_id in sorted(ids)[:5])
            raise DataError(
                f"{len(ids)} images {kind}, id {shown}{', ...' if len(ids) > 5 else ''}: every image of the data "
                "set must be evaluated exactly once; use the test loader of ovdet2, or Detectron2's sampler for it."
            )
    merged = Path(folder) / MERGED
    with contextlib.ExitStack() as stack, atomic_path(merged) as temporary:
        files = {path: stack.enter_context(open(path, "rb")) for path in paths}
        with open(temporary, "wb") as output:
            for image_id in sorted(places):
                path, offset, length = places[image_id]
                files[path].seek(offset)
                output.write(files[path].read(length))
    for path in paths:
        path.unlink()
    return merged


def read_merged(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the record of each image of a merged file."""
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def _index(path, token):
    """Yield (image id, (offset, length in bytes)) of each line of one process's file."""
    remedy = "the output folder must be on a file system that all machines of the run share"
    if not path.is_file():
        raise DataError(f"{path} does not exist: {remedy}.")
    with open(path, "rb") as handle:
        first = next(handle, b"{}\n")
        if json.loads(first).get("token") != token:
            raise DataError(f"{path} is not of this run: {remedy}, and no two runs may write to one folder.")
        offset = len(first)
        for line in handle:
            start = _LINE_START.match(line)
            if start is None or not line.endswith(b"\n"):
                raise DataError(f"{path} is damaged at byte {offset}: evaluate again.")
            yield int(start[1]), (offset, len(line))
            offset += len(line)


def _rank_path(folder, rank):
    return Path(folder) / f"predictions-rank{rank:04d}.jsonl"
