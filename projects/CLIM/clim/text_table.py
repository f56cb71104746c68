"""Embeddings of all captions, computed once: the text tower is frozen. Rows are in a file and are read on access.

safetensors file, schema 1: ``embeddings`` [T, D] f16, unit rows before rounding, one per caption in the source's order;
teacher fingerprint and the source's identity in the manifest.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional as F

from ovdet2.errors import DataError
from ovdet2.io.files import atomic_path
from ovdet2.io.progress import progress_bar
from ovdet2.vlm.fingerprint import Fingerprint, require_same_teacher

SCHEMA = "ovdet2/clim-text/1"


class TextTable:
    """Rows of a table, memory-mapped."""

    def __init__(self, path, source, teacher):
        """
        Args:
            path: file of :func:`build_text_table`.
            source: whose captions it must hold.
            teacher: :class:`Fingerprint` that it must be of.

        Raises:
            DataError: missing or damaged file, another teacher's, or of other captions.
        """
        self.path, remedy = Path(path), "delete it, or set CLIM.TEXT_TABLE to another file"
        try:
            with safe_open(str(path), framework="np") as file:
                manifest = json.loads((file.metadata() or {}).get("manifest", "{}"))
                self.shape = tuple(file.get_slice("embeddings").get_shape())
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is no complete text table ({error}): {remedy}.") from None
        if manifest.get("schema") != SCHEMA:
            raise DataError(f"{path} has schema {manifest.get('schema')!r}, expected {SCHEMA!r}: {remedy}.")
        found = Fingerprint.from_dict(manifest["teacher"], path)
        require_same_teacher(found, f"the text table {path}", teacher, "the model (MODEL.TEACHER)")
        if manifest["source"] != source.identity() or self.shape[0] != source.num_texts:
            raise DataError(
                f"{path} holds {self.shape[0]} captions of another source than CLIM.CAPTIONS with its "
                f"{source.num_texts}: {remedy}."
            )
        with open(path, "rb") as file:
            self._offset = 8 + int.from_bytes(file.read(8), "little")
        self._rows = None

    def __getitem__(self, row):
        """Unit embedding of a caption: Tensor [D] float32."""
        if self._rows is None:
            self._rows = np.memmap(self.path, np.float16, "r", self._offset, self.shape)
        return F.normalize(torch.from_numpy(self._rows[row].astype(np.float32)), dim=0)

    def __getstate__(self):
        return self.__dict__ | {"_rows": None}  # a worker maps the file itself


@torch.no_grad()
def build_text_table(path, source, teacher, batch_size=1024):
    """Embed the captions of a source; captions beyond the model's context are cut, as in CLIP's training.

    Args:
        path: file to write, atomically.
        source: see :class:`~ovdet2.data.readers.reader.CaptionReader`.
        teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
        batch_size: captions embedded per forward pass.
    """
    texts, progress = source.texts(), progress_bar(total=source.num_texts, desc="embedding captions", unit="caption")
    manifest = {"schema": SCHEMA, "source": source.identity(), "teacher": teacher.fingerprint.to_dict()}
    shape = [source.num_texts, teacher.embed_dim]
    layout = {"dtype": "F16", "shape": shape, "data_offsets": [0, 2 * shape[0] * shape[1]]}
    header = json.dumps({"__metadata__": {"manifest": json.dumps(manifest)}, "embeddings": layout}).encode()
    header += b" " * (-len(header) % 8)
    with progress, atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while chunk := list(itertools.islice(texts, batch_size)):
            tokens = teacher.tokenizer(chunk).to(teacher.mean.device)
            rows = F.normalize(teacher.clip.encode_text(tokens).float(), dim=1)
            file.write(rows.half().cpu().numpy().tobytes())
            progress.update(len(chunk))
