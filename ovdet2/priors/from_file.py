"""Concept priors from a user's JSON file: {image id: [[category id or word, score], ...]}."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ovdet2.errors import DataError
from ovdet2.io.files import read_json, sha256_file
from ovdet2.vocabulary.templates import clean_name

_FORM = "the form is {image id: [[category id or word, score], ...]}, scores in [0, 1]"


class FromFile:
    """The lists of a JSON file. Images of the data set that are not in the file have no list.

    Attributes:
        other_images: number of images of the file that are not in the data set.
        other_words: {id or word of the file that is not among the prior's words: number of its entries}.
    """

    kind = "prediction"

    def __init__(
        self, path: str | Path, words: Sequence[str], category_ids: Sequence[int], names: Sequence[str]
    ) -> None:
        """
        Args:
            path: JSON file; image ids are its keys.
            words: W words of the prior.
            category_ids: K dataset category ids, which the integers of the lists refer to.
            names: their K class names.

        Raises:
            DataError: the file is missing, or its JSON is no object.
        """
        self.path = path
        self._data = read_json(path, _FORM)
        if not isinstance(self._data, dict):
            raise DataError(f"{path} holds no object: {_FORM}.")
        position = {clean_name(word): index for index, word in enumerate(words)}
        self._position = position | {
            category_id: position[clean_name(name)]
            for category_id, name in zip(category_ids, names)
            if clean_name(name) in position
        }
        self.other_images, self.other_words = 0, {}

    @property
    def source(self) -> dict[str, Any]:
        return {"backend": "file", "sha256": sha256_file(self.path)}

    def lists(
        self, records: Sequence[Mapping[str, Any]], skip: Callable[[str], object]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The lists of the file, see :mod:`ovdet2.priors`.

        Raises:
            DataError: a malformed list, or no image or no word of the file is in the data set.
        """
        ids = {record["image_id"] for record in records}
        keys = {str(image_id) for image_id in ids}
        self.other_images = len(set(self._data) - keys)
        if self.other_images == len(self._data):
            raise DataError(f"{self.path} has none of the {len(keys)} images of the data set: {_FORM}.")
        listed = 0
        for image_id in sorted(ids):
            if str(image_id) in self._data:
                scores = self._of_image(image_id)
                listed += len(scores)
                yield image_id, torch.tensor(list(scores), dtype=torch.int64), torch.tensor(list(scores.values()))
        if self.other_words and not listed:
            raise DataError(
                f"{self.path}: none of its words is among the {len(self._position)} of the prior, first "
                f"{list(self.other_words)[:5]}: give a file for this data set, or its words with --words."
            )

    def _of_image(self, image_id):
        """{word index: score}."""
        entries, scores = self._data[str(image_id)], {}
        if not isinstance(entries, list):
            raise DataError(f"{self.path}, image {image_id}: no list; {_FORM}.")
        for entry in entries:
            well_formed = isinstance(entry, list) and len(entry) == 2 and type(entry[0]) in (int, str)
            if not (well_formed and type(entry[1]) in (int, float) and 0 <= entry[1] <= 1):
                raise DataError(f"{self.path}, image {image_id}: {entry!r}; {_FORM}.")
            word = clean_name(entry[0]) if isinstance(entry[0], str) else entry[0]
            index = self._position.get(word)
            if index is None:
                self.other_words[word] = self.other_words.get(word, 0) + 1
            elif index in scores:
                raise DataError(f"{self.path}, image {image_id}: {entry[0]!r} is listed twice; keep one.")
            else:
                scores[index] = float(entry[1])
        return scores
