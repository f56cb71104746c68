"""Captioned images of a TSV file."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovdet2.data.readers.faults import require_few
from ovdet2.data.readers.packed import as_int64, require_index
from ovdet2.data.readers.reader import CaptionReader
from ovdet2.errors import DataError
from ovdet2.io.files import sha256_file


class TsvCaptions(CaptionReader):
    """Lines of caption<TAB>path, as of CC3M; only the byte offset of each line is in memory, 8 bytes each.

    The id of an image is the position of its record.
    """

    def __init__(self, tsv_file: str | Path, folder: str | Path, max_bad: int = 0) -> None:
        """
        Args:
            tsv_file: UTF-8, one pair a line, no header.
            folder: that the paths are relative to.
            max_bad: number of lines without a caption or path that are skipped with a warning.

        Raises:
            DataError: no such file, more faulty lines than ``max_bad``, or no line left.
        """
        self.path, self.folder = Path(tsv_file), Path(folder)
        offsets, position, faults = array("q"), 0, []
        try:
            with open(self.path, "rb") as handle:
                for number, line in enumerate(handle, 1):
                    fault = _fault_of(line)
                    if fault is None:
                        offsets.append(position)
                    else:
                        faults.append(f"line {number} {fault}")
                    position += len(line)
        except OSError as error:
            raise DataError(
                f"{tsv_file} cannot be read ({error.strerror}): give a file of lines caption<TAB>path."
            ) from None
        require_few(faults, max_bad, tsv_file, len(offsets))
        self._offsets = as_int64(offsets)
        self._identity = {"kind": "tsv", "sha256": sha256_file(self.path)}

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = require_index(index, len(self))
        with open(self.path, "rb") as handle:
            caption, path = self._fields(handle, index)
        return {
            "file_name": str(self.folder / path),
            "image_id": index,
            "captions": (caption,),
            "first_text": index,
        }

    @property
    def num_texts(self) -> int:
        return len(self)

    def texts(self) -> Iterator[str]:
        with open(self.path, "rb") as handle:
            for index in range(len(self)):
                yield self._fields(handle, index)[0]

    def identity(self) -> dict[str, Any]:
        return self._identity

    def _fields(self, handle, index):
        handle.seek(self._offsets[index])
        caption, path = handle.readline().decode().split("\t")
        return caption.strip(), path.strip()


def _fault_of(line):
    """What is wrong with a line, or None."""
    try:
        fields = line.decode().rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        return "is no UTF-8"
    if len(fields) != 2:
        return f"has {len(fields)} fields instead of caption<TAB>path"
    if not all(field.strip() for field in fields):
        return f"has an empty {'path' if fields[0].strip() else 'caption'}"
    return "has a URL instead of the path of a downloaded image" if "://" in fields[1] else None
