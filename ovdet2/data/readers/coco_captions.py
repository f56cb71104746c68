"""Captioned images of a COCO-captions json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ovdet2.data.readers.faults import require_few, shown
from ovdet2.data.readers.packed import PackedStrings, require_index
from ovdet2.data.readers.reader import CaptionReader, stated_size
from ovdet2.errors import DataError
from ovdet2.io.files import read_json, sha256_file


class CocoCaptions(CaptionReader):
    """A COCO-captions json and its images, in the order of the json."""

    def __init__(self, json_file: str | Path, folder: str | Path, max_bad: int = 0) -> None:
        """
        Args:
            json_file: with "images" (id, file_name, and height and width in pixels if known) and "annotations"
                (image_id, caption).
            folder: that the file names are relative to.
            max_bad: number of images without a caption, and of empty captions, that are skipped with a warning.

        Raises:
            DataError: no such json, an image listed twice, a caption of an unknown image, more faults than ``max_bad``,
                or no image left.
        """
        data = read_json(json_file, "give a COCO-captions json")
        try:
            images = _images_of(data, json_file)
            captions, faults = _captions_of(data, images, json_file)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{json_file} is no COCO-captions json ({error!r}): give one with images and captions."
            ) from None
        without = [image for key, image in images.items() if key not in captions]
        faults += [f"image {image['id']} ({image['file_name']}) has no caption" for image in without]
        require_few(faults, max_bad, json_file, len(captions))
        used = {key: image for key, image in images.items() if key in captions}
        self.folder, self._identity = Path(folder), {"kind": "coco", "sha256": sha256_file(json_file)}
        self._ids = np.array(list(used), dtype=np.int64)
        self._sizes = np.array([stated_size(image) for image in used.values()], dtype=np.int32)
        self._names = PackedStrings(image["file_name"] for image in used.values())
        self._firsts = np.cumsum([0, *(len(captions[key]) for key in used)])
        self._texts = PackedStrings(text for key in used for text in captions[key])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = require_index(index, len(self))
        first, end = map(int, self._firsts[index : index + 2])
        record = {
            "file_name": str(self.folder / self._names[index]),
            "image_id": int(self._ids[index]),
            "captions": tuple(self._texts[row] for row in range(first, end)),
            "first_text": first,
        }
        height, width = map(int, self._sizes[index])
        return record | ({"height": height, "width": width} if height else {})

    @property
    def num_texts(self) -> int:
        return len(self._texts)

    def texts(self) -> Iterator[str]:
        return iter(self._texts)

    def identity(self) -> dict[str, Any]:
        return self._identity


def _images_of(data, json_file):
    """{image id: entry of the json}, in its order."""
    images = {image["id"]: image for image in data["images"]}
    wrong = [image["id"] for image in data["images"] if type(image["id"]) is not int or image["id"].bit_length() > 63]
    wrong += [key for key, image in images.items() if not isinstance(image["file_name"], str)]
    if wrong:
        raise DataError(f"{json_file} has images whose id is no integer or whose file_name is no text: {shown(wrong)}.")
    if len(images) < len(data["images"]):
        seen: set[int] = set()
        twice = [image["id"] for image in data["images"] if image["id"] in seen or seen.add(image["id"])]
        raise DataError(f"{json_file} has images twice, id {shown(twice)}: keep one entry of each.")
    return images


def _captions_of(data, images, json_file):
    """({image id: captions}, faults)."""
    captions, faults = defaultdict(list), []
    for entry in data["annotations"]:
        text = entry.get("caption")
        if entry["image_id"] not in images:
            raise DataError(f"{json_file} has a caption of image {entry['image_id']}, which is not in its images.")
        if isinstance(text, str) and text.strip():
            captions[entry["image_id"]].append(text.strip())
        else:
            faults.append(f"annotation {entry.get('id')} of image {entry['image_id']} has an empty caption")
    return dict(captions), faults
