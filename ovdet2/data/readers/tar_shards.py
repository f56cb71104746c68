"""Shards of webdataset: tar files in which the members of a sample share their name up to the first dot.

The headers and captions of the shards are read once, to make an index of the byte range of each sample. With it the
order of samples is a function of seed and epoch: processes, workers and resumed runs need no saved stream state, and a
table of embeddings has a row per sample.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm

from ovdet2.data.readers.faults import require_few
from ovdet2.data.readers.packed import as_int64, require_index
from ovdet2.data.readers.reader import CaptionReader
from ovdet2.errors import DataError, SetupError
from ovdet2.io.files import read_safetensors, write_safetensors
from ovdet2.io.manifests import fault_of
from ovdet2.io.members import member_address, read_bytes
from ovdet2.io.progress import progress_bar

SCHEMA = "ovdet2/clim-shards/1"  # the schema name of earlier versions, so that their indices are still read
_FORM = {"identity": object, "faults": [str]}
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_END = 1 << 16


class TarShards(CaptionReader):
    """Samples of uncompressed tar shards: an image (.jpg, .jpeg, .png, .webp) and a caption each (.txt, or the entry
    "caption" of a .json). The id of an image is the position of its record; 44 bytes of memory each.

    Attributes:
        shard: array [N] int32, ascending, the shard of each sample, as :class:`ShuffleBuffer` takes it.
    """

    def __init__(self, pattern: str | Path, index_file: str | Path | None = None, max_bad: int = 0) -> None:
        """
        Args:
            pattern: glob of the shards.
            index_file: file of the index, which is made again when the shards change; None: :func:`default_index`.
            max_bad: number of samples without image or caption that are skipped with a warning.

        Raises:
            DataError: no shard, one that is no complete tar file, more faulty samples than ``max_bad``, or none left.
            SetupError: the index cannot be written.
        """
        self.paths = [Path(path) for path in sorted(glob.glob(str(pattern)))]
        if not self.paths:
            raise DataError(f"no file matches {pattern}: give a glob pattern of tar shards.")
        index = default_index(pattern) if index_file is None else Path(index_file)
        self._identity = stated = {"kind": "tar", "shards": [_look_at(path) for path in self.paths]}
        tensors, faults = _read_index(index, stated) or _make_index(index, self.paths, stated)
        require_few(faults, max_bad, pattern, len(tensors["shard"]))
        self.shard, self._image, self._text = (tensors[key].numpy() for key in ("shard", "image", "text"))
        self._firsts = np.searchsorted(self.shard, np.arange(len(self.paths)))

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = require_index(index, len(self))
        shard = self.shard[index]
        number = index - self._firsts[shard]
        return {
            "file_name": member_address(self.paths[shard], number, *self._image[index]),
            "image_id": index,
            "captions": (self._caption(index),),
            "first_text": index,
        }

    @property
    def num_texts(self) -> int:
        return len(self)

    def texts(self) -> Iterator[str]:
        return (self._caption(index) for index in range(len(self)))

    def identity(self) -> dict[str, Any]:
        return self._identity

    def _caption(self, index):
        start, size, is_json = self._text[index]
        return _caption(read_bytes(self.paths[self.shard[index]], start, size), is_json)


def default_index(pattern: str | Path) -> Path:
    """Default path of the index of shards: in the deepest folder that contains all of them."""
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts[:-1]))
    name = hashlib.sha256("/".join(parts[len(fixed) :]).encode()).hexdigest()[:8]
    return Path(*fixed) / f"ovdet2_index_{name}.safetensors"


def _read_index(path, stated):
    if not path.is_file():
        return None
    tensors, manifest = read_safetensors(path, SCHEMA, "delete it")
    fault = fault_of(manifest, _FORM) or _fault_of_tensors(tensors)
    if fault:
        raise DataError(f"the index of shards {path} is damaged ({fault}): delete it.")
    return (tensors, manifest["faults"]) if manifest["identity"] == stated else None


def _fault_of_tensors(tensors):
    shapes = {"shard": (), "image": (2,), "text": (3,)}
    lacking = [name for name in shapes if name not in tensors]
    if lacking:
        return f"it has no {', '.join(lacking)}"
    rows = len(tensors["shard"]) if tensors["shard"].ndim else 0
    for name, shape in shapes.items():
        if tensors[name].shape != (rows, *shape) or tensors[name].dtype not in (torch.int32, torch.int64):
            return f"{name} is {tensors[name].dtype} of shape {list(tensors[name].shape)}"
    return None


def _make_index(path, shards, stated):
    rows, faults = array("q"), []
    for number, shard in enumerate(progress_bar(shards, desc="indexing shards", unit="shard")):
        for key, members in _samples(shard):
            fault, row = _row_of(shard, members)
            if row is None:
                faults.append(f"sample {key!r} of {shard.name} {fault}")
            else:
                rows.extend((number, *row))
    table = torch.from_numpy(as_int64(rows).reshape(-1, 6).copy())
    tensors = {"shard": table[:, 0].to(torch.int32), "image": table[:, 1:3], "text": table[:, 3:]}
    if comm.is_main_process():
        try:
            write_safetensors(path, tensors, {"schema": SCHEMA, "identity": stated, "faults": faults})
        except (OSError, SetupError) as error:
            raise SetupError(
                f"the index of the shards cannot be written to {path} ({getattr(error, 'strerror', error)}): name another file for it "
                "(index_file)."
            ) from None
    return tensors, faults


def _look_at(path):
    """[name, bytes, hash of the first and last 64 KiB] of a shard: a cheap check that it has not been replaced."""
    size = path.stat().st_size
    with open(path, "rb") as shard:
        ends = shard.read(_END)
        shard.seek(max(0, size - _END))
        return [path.name, size, hashlib.sha256(ends + shard.read()).hexdigest()]


def _samples(path):
    """(key, {ending: (first byte, size)}) of each sample of a shard, in order."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} is no complete uncompressed tar file ({error}): unpack or download it again."
        ) from None
    if members and members[-1][1] + members[-1][2] > path.stat().st_size:
        raise DataError(f"{path} is truncated: {members[-1][0]} goes beyond its end; download it again.")
    for key, group in itertools.groupby(members, key=lambda member: _split(member[0])[0]):
        yield key, {_split(name)[1]: (start, size) for name, start, size in group}


def _split(name):
    """("folder/000", "jpg") of "folder/000.jpg": at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def _row_of(
    path: Path, members: dict[str, tuple[int, int]]
) -> tuple[str, None] | tuple[None, tuple[int, int, int, int, int]]:
    """(fault, None), or (None, (image start, image size, text start, text size, text is json))."""
    image = next((members[ending] for ending in _IMAGES if ending in members), None)
    ending = next((ending for ending in _TEXTS if ending in members), None)
    if image is None or ending is None:
        return f"has no {'image' if image is None else 'caption'} ({', '.join(members)})", None
    start, size = members[ending]
    if not _caption(read_bytes(path, start, size), ending == "json"):
        return f"has an empty or unreadable caption (.{ending})", None
    return None, (*image, start, size, int(ending == "json"))


def _caption(data, is_json):
    """The caption, or "" if there is none."""
    try:
        text = json.loads(data).get("caption") if is_json else data.decode()
    except (ValueError, AttributeError):
        return ""
    return text.strip() if isinstance(text, str) else ""
