"""The caption cache: embeddings of all captions of a data set by the frozen text tower, computed once.

A safetensors file, schema 1: ``image_ids`` [I] i64 and ``offsets`` [I + 1] i64, the rows of each image; ``embeddings``
[T, D] f16, unit rows before rounding, one per caption in the order of the data set. The manifest holds the teacher's
fingerprint, the data set and the identity of its caption files.

Shapes: I images, T captions, D embedding dimension.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from ovdet2.errors import CacheError, DataError
from ovdet2.io.files import atomic_path
from ovdet2.io.manifests import fault_of, parse_manifest
from ovdet2.io.progress import progress_bar
from ovdet2.vlm.fingerprint import Fingerprint, require_same_teacher

if TYPE_CHECKING:
    from ovdet2.vlm.teacher import Teacher

SCHEMA = "ovdet2/captions/1"
_FORM = {"schema": str, "dataset": str, "source": {str: object}, "teacher": {str: object}}
_BUILD = "build it by ovdet2 cache captions"


class CaptionCache:
    """A caption cache, whose rows are read from the file when they are needed. Picklable.

    Attributes:
        path: of the file.
        manifest: see the module.
        shape: (T, D).
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            CacheError: the file is missing, damaged, or no caption cache.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise CacheError(f"there is no caption cache {path}: {_BUILD}.")
        try:
            with safe_open(str(path), framework="np") as file:
                self.manifest: Any = parse_manifest(file.metadata())
                ids, self._offsets = file.get_tensor("image_ids"), file.get_tensor("offsets")
                self.shape: tuple[int, int] = tuple(file.get_slice("embeddings").get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise CacheError(f"{path} is no complete caption cache ({error}): {_BUILD}.") from None
        fault = fault_of(self.manifest, _FORM)
        if fault or self.manifest["schema"] != SCHEMA:
            raise CacheError(f"{path} is no caption cache ({fault or f'its schema is not {SCHEMA}'}): {_BUILD}.")
        if len(self._offsets) != len(ids) + 1 or self._offsets[-1] != self.shape[0]:
            raise CacheError(f"{path} holds {self.shape[0]} rows, but its images have other numbers: {_BUILD}.")
        self._order = np.argsort(ids, kind="stable")
        self._ids = ids[self._order]
        with open(path, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            start = json.loads(stream.read(header))["embeddings"]["data_offsets"][0]
        self._start = 8 + header + start
        self._rows: np.ndarray | None = None

    @property
    def teacher(self) -> Fingerprint:
        """Fingerprint of the model that embedded the captions."""
        return Fingerprint.from_dict(self.manifest["teacher"], f"the caption cache {self.path}")

    def __len__(self) -> int:
        return self.shape[0]

    def embedding(self, image_id: int, number: int, count: int) -> Tensor:
        """Embedding of a caption of an image: Tensor [D] float32, a unit vector.

        Args:
            image_id: of the data set.
            number: of the caption in its record, from 0.
            count: captions of the record.

        Raises:
            CacheError: the cache does not hold the image, or holds another number of captions of it.
        """
        place = int(np.searchsorted(self._ids, image_id))
        if place == len(self._ids) or self._ids[place] != image_id:
            raise CacheError(f"{self.path} has no caption of image {image_id}: it is of other captions; {_BUILD}.")
        first, end = map(int, self._offsets[self._order[place] :][:2])
        if end - first != count:
            raise CacheError(
                f"{self.path} has {end - first} captions of image {image_id}, the data set {count}: {_BUILD}."
            )
        if self._rows is None:
            self._rows = np.memmap(self.path, np.float16, "r", self._start, self.shape)
        return F.normalize(torch.from_numpy(self._rows[first + number].astype(np.float32)), dim=0)

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Raise CacheError unless the captions were embedded by this teacher; ``owner`` names it in the message."""
        try:
            require_same_teacher(self.teacher, f"the caption cache {self.path}", teacher, owner)
        except DataError as error:
            raise CacheError(str(error)) from None

    def require_source(self, dataset: str, identity: dict[str, Any]) -> None:
        """Raise CacheError unless the cache is of the captions ``identity`` of a data set.

        Args:
            dataset: registered name, for the message.
            identity: see :meth:`~ovdet2.data.readers.reader.CaptionReader.identity`.
        """
        if self.manifest["source"] != json.loads(json.dumps(identity)):
            raise CacheError(
                f"{self.path} holds captions of {self.manifest['dataset']} from other files than those of {dataset} "
                f"now: {_BUILD} --dataset {dataset}."
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}  # a worker maps the file again


def write_caption_cache(
    path: str | Path, dataset: str, reader: Any, teacher: Teacher, batch_size: int = 1024
) -> dict[str, Any]:
    """Embed the captions of a data set; captions beyond the model's context are cut, as in CLIP's training.

    Args:
        path: file to write, atomically; memory is needed for a batch only.
        dataset: registered name.
        reader: its :class:`~ovdet2.data.readers.reader.CaptionReader`.
        teacher: that embeds them.
        batch_size: captions per forward pass.

    Returns:
        The manifest.
    """
    records = [(record["image_id"], len(record["captions"])) for record in reader]
    image_ids = np.array([image_id for image_id, _ in records], dtype="<i8")
    offsets = np.cumsum([0, *(count for _, count in records)]).astype("<i8")
    manifest = {
        "schema": SCHEMA, "dataset": dataset, "source": reader.identity(), "teacher": teacher.fingerprint.to_dict(),
        "images": len(records), "captions": int(offsets[-1]),
    }  # fmt: skip
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(manifest, image_ids, offsets, teacher.embed_dim))
        file.write(image_ids.tobytes() + offsets.tobytes())
        for rows in _embedded(reader, teacher, batch_size):
            file.write(rows.astype("<f2").tobytes())
    return manifest


def _header(manifest, image_ids, offsets, dim):
    """The first bytes of a safetensors file of these tensors; the embeddings are last, at a multiple of 8 bytes."""
    ids_end, offsets_end = image_ids.nbytes, image_ids.nbytes + offsets.nbytes
    count = int(offsets[-1])
    layout = {
        "__metadata__": {"manifest": json.dumps(manifest, ensure_ascii=False)},
        "image_ids": {"dtype": "I64", "shape": [len(image_ids)], "data_offsets": [0, ids_end]},
        "offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [ids_end, offsets_end]},
        "embeddings": {
            "dtype": "F16", "shape": [count, dim], "data_offsets": [offsets_end, offsets_end + 2 * count * dim]
        },
    }  # fmt: skip
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@torch.no_grad()
def _embedded(reader: Any, teacher: Teacher, batch_size: int) -> Iterator[np.ndarray]:
    texts, bar = reader.texts(), progress_bar(total=reader.num_texts, desc="embedding captions", unit="caption")
    with bar:
        while chunk := list(itertools.islice(texts, batch_size)):
            tokens = teacher.tokenizer(chunk).to(teacher.mean.device)
            yield F.normalize(teacher.clip.encode_text(tokens).float(), dim=1).half().cpu().numpy()
            bar.update(len(chunk))
