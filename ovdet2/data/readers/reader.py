"""The protocol of readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ovdet2.data.datasets.validity import size_of
from ovdet2.data.samples import CAPTIONS
from ovdet2.io.images import read_image


class Reader:
    """A picklable sequence of records. Each access makes a new dict:

    - "file_name": what :func:`~ovdet2.io.images.read_image` decodes: a path, or the address of a member of a tar file
      (:mod:`ovdet2.io.members`);
    - "image_id": int, unique in the data set;
    - "height", "width": pixels of the image as it is shown, if the data set states both;
    - its captions or labels, see the subclasses.

    Attributes:
        kind: one of :data:`~ovdet2.data.samples.KINDS`.
    """

    kind: str = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def read(self, record: Mapping[str, Any], image_format: str = "RGB") -> np.ndarray:
        """Image of a record, array [H, W, C] uint8, see :func:`~ovdet2.io.images.read_image`. Raises DataError."""
        return read_image(record["file_name"], image_format)


class CaptionReader(Reader):
    """Images with captions. A record has in addition:

    - "captions": tuple of str, at least one;
    - "first_text": row of the first of them in :meth:`texts`; the others follow.
    """

    kind = CAPTIONS

    @property
    def num_texts(self) -> int:
        """Number of captions of all images."""
        raise NotImplementedError

    def texts(self) -> Iterator[str]:
        """All captions, image by image in the order of the records. Tables of their embeddings have the same order."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """JSON-serialisable dict that identifies the files of these captions (names, sizes, hashes)."""
        raise NotImplementedError


def stated_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) in pixels of an entry of COCO's "images"; zeros if it does not state both."""
    width, height = size_of(image) or (0, 0)
    return height, width
