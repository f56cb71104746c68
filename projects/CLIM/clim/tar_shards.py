"""webdataset's shards: tar files in which the members of a sample share their name up to the first dot.

The shards are gone through once, headers and captions alone, for an index of where each sample lies. From then on the
order of samples is a function of seed and epoch, so processes, workers and resumed runs need no state of a stream, and
the text table has a row per sample. Shards are taken in random order and read nearly from front to back, as through a
shuffle buffer, of which only the indices are kept.
"""

import glob
import hashlib
import io
import itertools
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from detectron2.utils import comm
from tqdm import tqdm

from clim.sources import require_few
from ovdet2.errors import DataError
from ovdet2.io.files import read_safetensors, write_safetensors
from ovdet2.io.images import decode_image

SCHEMA = "ovdet2/clim-shards/1"
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_END = 1 << 16


class TarShards:
    """Samples of uncompressed tar shards: an image (.jpg, .jpeg, .png, .webp) and a caption each (.txt, or the entry
    "caption" of a .json)."""

    def __init__(self, pattern, index_file, max_bad=0):
        """
        Args:
            pattern: glob of the shards.
            index_file: where the index is kept; made again when the shards changed.
            max_bad: samples without image or caption that are left out with a warning.

        Raises:
            DataError: no shard, one that is no whole tar file, more faulty samples than ``max_bad``, or none left.
        """
        self.paths = [Path(path) for path in sorted(glob.glob(str(pattern)))]
        if not self.paths:
            raise DataError(f"no file matches {pattern}: set CLIM.CAPTIONS to a pattern of tar shards.")
        self._identity = stated = {"kind": "tar", "shards": [_look_at(path) for path in self.paths]}
        tensors, faults = self._read_index(Path(index_file), stated) or self._make_index(Path(index_file), stated)
        require_few(faults, max_bad, pattern, len(tensors["shard"]))
        self.shard, self._image, self._text = (tensors[key].numpy() for key in ("shard", "image", "text"))

    def __len__(self):
        return len(self.shard)

    num_texts = property(__len__)

    def __getitem__(self, index):
        name = f"{self.paths[self.shard[index]]}, sample {index - np.searchsorted(self.shard, self.shard[index])}"
        return {"file_name": name, "image_id": int(index), "first": int(index), "captions": 1}

    def texts(self):
        """See :meth:`clim.sources.CocoCaptions.texts`."""
        for index in range(len(self)):
            start, size, is_json = self._text[index]
            yield _caption(self._bytes(index, start, size), is_json)

    def identity(self):
        """See :meth:`clim.sources.CocoCaptions.identity`."""
        return self._identity

    def read(self, record):
        """See :meth:`clim.sources.CocoCaptions.read`."""
        index = record["image_id"]
        return decode_image(io.BytesIO(self._bytes(index, *self._image[index])), record["file_name"])

    def _bytes(self, index, start, size):
        with open(self.paths[self.shard[index]], "rb") as shard:
            shard.seek(start)
            return shard.read(size)

    def _read_index(self, path, stated):
        if not path.is_file():
            return None
        tensors, manifest = read_safetensors(path, SCHEMA, "delete it")
        return (tensors, manifest["faults"]) if manifest["identity"] == stated else None

    def _make_index(self, path, stated):
        rows, faults = [], []
        for number, shard in enumerate(tqdm(self.paths, desc="indexing shards", unit="shard")):
            for key, members in _samples(shard):
                fault, row = _row_of(shard, members)
                if fault:
                    faults.append(f"sample {key!r} of {shard.name} {fault}")
                else:
                    rows.append((number, *row))
        table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)
        tensors = {"shard": table[:, 0].to(torch.int32), "image": table[:, 1:3], "text": table[:, 3:]}
        if comm.is_main_process():
            write_safetensors(path, tensors, {"schema": SCHEMA, "identity": stated, "faults": faults})
        return tensors, faults


class ShuffleBuffer:
    """Endless indices of this process: shards in random order, samples drawn from a buffer that they flow through."""

    def __init__(self, shard, size, seed):
        """
        Args:
            shard: array [N], ascending, the shard of each sample.
            size: of the buffer, at least 1.
            seed: int, the same in every process.
        """
        self.starts = np.searchsorted(shard, np.arange(shard[-1] + 2))
        self.size, self.seed = size, seed

    def __iter__(self):
        draws = itertools.chain.from_iterable(map(self._epoch, itertools.count()))
        return itertools.islice(draws, comm.get_rank(), None, comm.get_world_size())

    def _epoch(self, epoch):
        random = np.random.default_rng((self.seed, epoch))
        buffer = []
        for number in random.permutation(len(self.starts) - 1):
            for index in range(self.starts[number], self.starts[number + 1]):
                if len(buffer) < self.size:
                    buffer.append(index)
                    continue
                slot = random.integers(self.size)
                yield int(buffer[slot])
                buffer[slot] = index
        yield from (int(buffer[slot]) for slot in random.permutation(len(buffer)))


def _look_at(path):
    """[name, bytes, hash of both ends] of a shard: what is cheap to see of another one under its name."""
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
        raise DataError(f"{path} is no whole uncompressed tar file ({error}): unpack or download it again.") from None
    if members and members[-1][1] + members[-1][2] > path.stat().st_size:
        raise DataError(f"{path} is truncated: {members[-1][0]} goes beyond its end; download it again.")
    for key, group in itertools.groupby(members, key=lambda member: _split(member[0])[0]):
        yield key, {_split(name)[1]: (start, size) for name, start, size in group}


def _split(name):
    """("folder/000", "jpg") of "folder/000.jpg": at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending.lower()


def _row_of(path, members):
    """(fault or None, (image start, image size, text start, text size, text is json))."""
    image = next((members[ending] for ending in _IMAGES if ending in members), None)
    ending = next((ending for ending in _TEXTS if ending in members), None)
    if image is None or ending is None:
        return f"has no {'image' if image is None else 'caption'} ({', '.join(members)})", None
    start, size = members[ending]
    with open(path, "rb") as shard:
        shard.seek(start)
        caption = _caption(shard.read(size), ending == "json")
    if not caption:
        return f"has an empty or unreadable caption (.{ending})", None
    return None, (*image, start, size, int(ending == "json"))


def _caption(data, is_json):
    """The caption, "" where there is none."""
    try:
        text = json.loads(data).get("caption") if is_json else data.decode()
    except (ValueError, AttributeError):
        return ""
    return text.strip() if isinstance(text, str) else ""
