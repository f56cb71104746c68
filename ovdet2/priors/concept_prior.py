"""Concept prior: the scored words that are present in each image, one file per data set, of any backend.

A prior holds words, not embeddings. It therefore serves detectors of any teacher and any vocabulary; words are matched
by cleaned name. Lists are long and sorted, so that a reader can choose threshold and top L without rebuilding.

Shapes: I images, W words of the prior, E entries of all images, K words of a caller. The file is a safetensors with
``image_ids`` [I] int64 ascending, ``offsets`` [I + 1] int64 (the entries of image i are offsets[i] to offsets[i + 1]),
``word_index`` [E] int32 into the manifest's words, ``score`` [E] float32 in (0, 1]; within an image by descending
score, ties by ascending word index.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ovdet2.errors import CacheError
from ovdet2.io.files import sha256_file, write_safetensors
from ovdet2.io.manifests import fault_of, parse_manifest
from ovdet2.vocabulary import check_words
from ovdet2.vocabulary.templates import clean_name

if TYPE_CHECKING:
    from safetensors import safe_open

logger = logging.getLogger(__name__)

SCHEMA = "ovdet2/concept-prior/1"
KINDS = ("prediction", "ground truth", "simulation", "control")
_DTYPES = {"image_ids": torch.int64, "offsets": torch.int64, "word_index": torch.int32, "score": torch.float32}
_FORM = {
    "words": [str],
    "kind": str,
    "source": {str: object},
    "dataset": str,
    "dataset_sha256": str,
    "missing_image_ids": [object],
    "content_sha256": str,
}
_BUILD = "build it with ovdet2 prior"


class PriorWriter:
    """Collects the lists of a data set, each limited to its ``top`` words, and writes them to a file."""

    def __init__(self, words: Sequence[str], image_ids: Iterable[int], top: int = 100) -> None:
        """
        Args:
            words: W words, unique after cleaning.
            image_ids: of all images of the data set; images without a list are written as missing.
            top: maximum number of words per image, at least 1.
        """
        check_words(words)
        self.words = tuple(words)
        self.top = top
        self._image_ids = frozenset(image_ids)
        self._lists = {}
        self._all = torch.arange(len(self.words))

    def add(self, image_id: int, word_index: torch.Tensor | None, score: torch.Tensor) -> None:
        """Add the list of one image. Words of score 0 are not listed.

        Args:
            image_id: one of the data set, not added before.
            word_index: Tensor [n] of indices into the words, each once, in any order; None for all W in order.
            score: Tensor [n], in [0, 1].

        Raises:
            ValueError: an argument is invalid.
        """
        score = score.detach().float().cpu()
        if image_id not in self._image_ids or image_id in self._lists:
            raise ValueError(f"image id {image_id} is not of the data set, or was added before")
        if word_index is None:
            index = self._all
        else:
            index = word_index.long().cpu()
            if ((index < 0) | (index >= len(self.words))).any() or len(index.unique()) != len(index):
                raise ValueError(f"the word indices of image id {image_id} are not different ones of {len(self.words)}")
        if index.shape != score.shape or not torch.all((score >= 0) & (score <= 1)):  # false for NaN too
            raise ValueError(f"the scores of image id {image_id} are not one per word in [0, 1]")
        self._lists[image_id] = best(index, score, self.top)

    @property
    def entries(self) -> int:
        """Number of words in all lists."""
        return sum(len(index) for index, _ in self._lists.values())

    def save(
        self, path: str | Path, dataset: str, dataset_sha256: str, source: dict[str, Any], kind: str
    ) -> dict[str, Any]:
        """Write the file atomically.

        Args:
            path: the file.
            dataset: name of the data set.
            dataset_sha256: of its json.
            source: JSON-serialisable dict of the inputs of the scores, with "backend".
            kind: one of :data:`KINDS`.

        Returns:
            The manifest.
        """
        if kind not in KINDS:
            raise ValueError(f"the kind of a prior is one of {KINDS}, not {kind!r}")
        ids = sorted(self._lists)
        lists = [self._lists[image_id] for image_id in ids]
        tensors = {
            "image_ids": torch.tensor(ids, dtype=torch.int64),
            "offsets": torch.tensor([0] + [len(index) for index, _ in lists], dtype=torch.int64).cumsum(0),
            "word_index": torch.cat([torch.zeros(0, dtype=torch.int32)] + [index for index, _ in lists]),
            "score": torch.cat([torch.zeros(0)] + [score for _, score in lists]),
        }
        manifest = {
            "schema": SCHEMA,
            "kind": kind,
            "source": source,
            "dataset": dataset,
            "dataset_sha256": dataset_sha256,
            "images": len(ids),
            "entries": len(tensors["score"]),
            "config": {"top": self.top},
            "missing_image_ids": sorted(self._image_ids - set(ids)),
            "content_sha256": content_sha256(tensors, self.words),
            "words": list(self.words),
        }
        write_safetensors(path, tensors, manifest)
        return manifest


def best(index: torch.Tensor, score: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``top`` entries above 0 by descending score, ties by ascending index.

    Args:
        index: Tensor [n] int64; score: Tensor [n] float32.

    Returns:
        (index int32, score float32), at most ``top`` each.
    """
    least = score.topk(top).values[-1] if len(score) > top else score.new_zeros(())
    kept = (score >= least) & (score > 0)
    index, score = index[kept], score[kept]
    order = index.argsort()
    order = order[score[order].argsort(descending=True, stable=True)][:top]
    return index[order].int(), score[order]


def columns_of(words: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """Index of each word among ``names``, by cleaned name: Tensor [W] int64, -1 for a word that is not there.

    Raises:
        UsageError: two of ``names`` clean to the same text.
    """
    check_words(names)
    position = {clean_name(name): index for index, name in enumerate(names)}
    return torch.tensor([position.get(clean_name(word), -1) for word in words], dtype=torch.int64)


class Coverage(NamedTuple):
    """Overlap of the words of a prior and the words of a caller; lists of words.

    Attributes:
        shared: words of both.
        dropped: words of the prior only; they are ignored.
        unknown: words of the caller only; they have no score and are never selected.
    """

    shared: list
    dropped: list
    unknown: list


class ConceptPriors:
    """Reads a prior by image id; memory-mapped, picklable, safe in data loading workers with any start method.

    Attributes:
        path: the file.
        manifest: dict.
        words: W words.
        kind: one of :data:`KINDS`.
        missing: frozenset of image ids of the data set without a list (unreadable, or not given to the backend); no
            word is selected for them.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: the file.

        Raises:
            CacheError: no file, another schema, or a damaged one.
        """
        self.path = Path(path)
        self._file: safe_open | None = None
        file, self.manifest = self._open()
        tensors = {name: file.get_tensor(name) for name in _DTYPES}
        self.words = tuple(self.manifest["words"])
        self.kind = self.manifest["kind"]
        self.missing = frozenset(self.manifest["missing_image_ids"])
        fault = _fault(tensors, len(self.words))
        if not fault and content_sha256(tensors, self.words) != self.manifest["content_sha256"]:
            fault = "its content does not have the SHA-256 of its manifest"
        if fault:
            raise CacheError(f"the concept prior {path} is damaged ({fault}): {_BUILD} again.")
        self._offsets = tensors["offsets"].tolist()
        self._rows = {image_id: row for row, image_id in enumerate(tensors["image_ids"].tolist())}
        self._matched = None  # (names of the last query, index of each word among them)

    def __len__(self):
        """Number of images with a list."""
        return len(self._rows)

    def __str__(self):
        """One line for a log: kind, source, data set, number of missing images."""
        label = "" if self.kind == "prediction" else f"{self.kind.upper()}, "
        source = ", ".join(f"{key} {_short(value)}" for key, value in self.manifest["source"].items())
        return (
            f"{self.path}: {label}{source}; {len(self.words)} words, {len(self)} images of {self.manifest['dataset']}, "
            f"{len(self.missing)} missing"
        )

    def scores(self, image_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The complete list of an image.

        Args:
            image_id: of the data set; one of ``missing`` gives an empty list.

        Returns:
            (word_index [n] int64 into ``words``, score [n] float32), by descending score.

        Raises:
            CacheError: the image is not of this prior's data set.
        """
        row = self._rows.get(image_id)
        if row is None and image_id not in self.missing:
            raise CacheError(
                f"the concept prior {self.path} has no entry for image id {image_id}: it was made for other images "
                f"({self.manifest['dataset']}); {_BUILD} for this data set."
            )
        start, end = (0, 0) if row is None else self._offsets[row : row + 2]
        file = self._open()[0] if self._file is None else self._file
        word_index, score = (file.get_slice(name)[start:end] for name in ("word_index", "score"))
        return word_index.long(), score

    def ranked(self, image_id: int, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The list of an image as indices into a caller's words.

        Args:
            image_id: as of :meth:`scores`.
            names: K names, in any order, unique after cleaning.

        Returns:
            (index [n] int64 into ``names``, score [n] float32), by descending score; words that are not in ``names``
            are dropped (see :meth:`coverage`).
        """
        word_index, score = self.scores(image_id)
        column = self._columns(names)[word_index]
        return column[column >= 0], score[column >= 0]

    def select(
        self, image_id: int, threshold: float = 0.0, top: int | None = None, names: Sequence[str] | None = None
    ) -> torch.Tensor:
        """The present words of an image: {c: score >= rho} in CCKT, at most the L highest scores.

        Args:
            image_id: as of :meth:`scores`.
            threshold: rho, compared in float32 as scores are stored.
            top: L, applied after dropping words that are not in ``names``; None for no limit.
            names: the caller's K names; None for this prior's words.

        Returns:
            Tensor [n] int64 of indices into ``names``, n <= L, by descending score; may be empty.
        """
        index, score = self.scores(image_id) if names is None else self.ranked(image_id, names)
        return index[score >= torch.tensor(threshold, dtype=torch.float32)][:top]

    def coverage(self, names: Sequence[str]) -> Coverage:
        """:class:`Coverage` of a caller's names."""
        column = self._columns(names).tolist()
        matched = set(column)
        return Coverage(
            [word for word, position in zip(self.words, column) if position >= 0],
            [word for word, position in zip(self.words, column) if position < 0],
            [name for position, name in enumerate(names) if position not in matched],
        )

    def require_dataset(self, name: str, json_file: str | Path) -> None:
        """Raise CacheError unless the prior was made for exactly this json."""
        digest, stated = sha256_file(json_file), self.manifest["dataset_sha256"]
        if stated != digest:
            raise CacheError(
                f"the concept prior {self.path} was made for {self.manifest['dataset']} with annotations of SHA-256 "
                f"{stated[:12]}, but {name} reads {json_file} with {digest[:12]}: {_BUILD} for it."
            )

    def _columns(self, names):
        names = tuple(names)
        if self._matched is None or self._matched[0] != names:
            self._matched = names, columns_of(self.words, names)
            dropped, unknown = (len(part) for part in self.coverage(names)[1:])
            if dropped or unknown:
                logger.warning(
                    "%s: %d of its %d words are not in the vocabulary and are ignored; it has no scores for %d of the "
                    "vocabulary's %d words",
                    *(self.path, dropped, len(self.words), unknown, len(names)),
                )
        return self._matched[1]

    def _open(self) -> tuple[safe_open, dict[str, Any]]:
        """Open the file and read its manifest: (file, manifest). The file stays open."""
        from safetensors import SafetensorError, safe_open

        if not self.path.is_file():
            raise CacheError(f"the concept prior {self.path} does not exist: {_BUILD}.")
        try:
            self._file = file = safe_open(str(self.path), framework="pt")
            manifest = parse_manifest(file.metadata())
            names = set(file.keys())
        except (SafetensorError, OSError, ValueError) as error:  # ValueError: a manifest that is not JSON
            raise CacheError(f"{self.path} is not a complete concept prior ({error}): {_BUILD} again.") from None
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise CacheError(f"{self.path} has schema {schema!r}, this version reads {SCHEMA!r}: {_BUILD}.")
        lacking = sorted(set(_DTYPES) - names)
        fault = f"it has no {', '.join(lacking)}" if lacking else _fault_of_manifest(manifest)
        if fault:
            raise CacheError(f"{self.path} is damaged ({fault}): {_BUILD} again.")
        return file, manifest

    def __getstate__(self):
        return self.__dict__ | {"_file": None}  # another process opens its own memory map


def content_sha256(tensors: dict[str, torch.Tensor], words: Sequence[str]) -> str:
    """SHA-256 of the words and the four tensors."""
    digest = hashlib.sha256("\n".join(words).encode())
    for name in sorted(_DTYPES):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def _fault_of_manifest(manifest):
    """What is wrong with the manifest of a file, or None."""
    fault = fault_of(manifest, _FORM)
    if fault:
        return fault
    if manifest["kind"] not in KINDS:
        return f"its kind is {manifest['kind']!r}, none of {', '.join(KINDS)}"
    if not all(type(image_id) is int for image_id in manifest["missing_image_ids"]):
        return "missing_image_ids holds what is no whole number"
    return None


def _fault(tensors, num_words):
    """What is wrong with the tensors of a file, or None."""
    for name, dtype in _DTYPES.items():
        if tensors[name].dtype != dtype or tensors[name].ndim != 1:
            return f"{name} is {tensors[name].dtype} of shape {list(tensors[name].shape)}"
    ids, offsets, word_index, score = tensors.values()
    if len(offsets) != len(ids) + 1 or offsets[0] != 0 or offsets[-1] != len(score) or len(score) != len(word_index):
        return f"{len(ids)} images, {len(offsets)} offsets, {len(word_index)} words and {len(score)} scores"
    if (offsets.diff() < 0).any() or (ids.diff() <= 0).any():
        return "offsets or image ids do not ascend"
    if ((word_index < 0) | (word_index >= num_words)).any() or not ((score >= 0) & (score <= 1)).all():
        return "a word index or a score is out of range"
    return None


def _short(value):
    """A value of a manifest's source as text; a hash is shortened to its first digits."""
    if isinstance(value, dict):
        return "/".join(_short(part) for part in value.values())
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
