"""Store many values in a few arrays: a list of millions of objects takes gigabytes, and each worker copies it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class PackedStrings(Sequence[str]):
    """An immutable list of strings as one array of bytes: 8 bytes a string and their UTF-8."""

    def __init__(self, strings: Iterable[str]) -> None:
        """
        Args:
            strings: consumed one by one. Lone surrogates are preserved; names of files that are no UTF-8 have them.
        """
        content, ends = bytearray(), array("q", [0])
        for string in strings:
            content += string.encode("utf-8", "surrogatepass")
            ends.append(len(content))
        self._bytes = np.frombuffer(bytes(content), dtype=np.uint8)
        self._ends = as_int64(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = require_index(index, len(self))
        start, end = self._ends[index : index + 2]
        return self._bytes[start:end].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def as_int64(values: array) -> np.ndarray:
    """An ``array`` of type "q" as a numpy array, without a copy."""
    return np.frombuffer(values, dtype=np.int64) if len(values) else np.empty(0, dtype=np.int64)


def require_index(index: int | np.integer, count: int) -> int:
    """``index`` into a sequence of ``count`` entries as an int in [0, count); negative ones count from the end.

    Raises:
        IndexError: it is out of range.
    """
    if not -count <= index < count:
        raise IndexError(f"index {index} of {count} entries")
    return int(index) % count
