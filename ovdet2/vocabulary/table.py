"""The vocabulary: class names with their text embeddings and the teacher that made them.

Shapes: K words, B of them base, M names of all words, D embedding dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ovdet2.errors import DataError, OVDetError, UsageError
from ovdet2.io.files import read_safetensors, write_safetensors
from ovdet2.io.manifests import Optional, fault_of
from ovdet2.io.progress import progress_bar
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary.templates import (
    clean_name,
    get_templates,
    is_visible,
    render,
    set_title,
    template_set_names,
    templates_sha256,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from ovdet2.vlm.teacher import Teacher

SCHEMA = "ovdet2/vocabulary/1"
_FORM = {
    "names": [str],
    "templates": str,
    "category_ids": (None, [object]),
    "synonyms": Optional((None, [[str]])),
    "templates_sha256": Optional((None, str)),
    "thresholds": Optional((None, [object])),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FURTHER = "further_trained_names"  # key of a checkpoint's manifest
_NAME_ROWS, _NAME_WORDS = "name_embeddings", "name_words"  # tensors of a vocabulary pooled by maximum
POOLINGS = ("mean", "max")
PROMPTS_AT_ONCE = 1024  # prompts per call of the text encoder
_SHOWN = 10  # repeated words in a message


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Class names and their unit text embeddings, the class input of every open-vocabulary module.

    Attributes:
        names: K class names, unique after cleaning, none empty.
        base_mask: Tensor [K] bool, True for base words, which have training boxes.
        embeddings: Tensor [K, D] float32, unit rows.
        teacher: :class:`Fingerprint` of the model that embedded them.
        templates: name of the prompt template set; for imported tables the user's description of the prompts.
        category_ids: K dataset category ids, or None for words without a data set.
        synonyms: K tuples of the names whose embeddings were averaged for each word (with "max" compared), its own name
            first, unless only other names were used (``ovdet2 synonyms``); None: every word has its name only.
        templates_sha256: hash of the templates; by default of the set ``templates``, None if there is no such set.
        thresholds: K scores in [0, 1], or None for a word without one: the detector's detections of a word count above
            its threshold. Chosen on a validation set for one detector (``ovdet2 vocab thresholds``). None: no thresholds.
        name_embeddings: Tensor [M, D] float32, unit rows, of the names of all words, for words whose score is the
            maximum over their names; ``embeddings`` are their means. None: the names are averaged.
        name_words: Tensor [M] int64, ascending: the word of each row of ``name_embeddings``.

    Raises:
        UsageError: empty vocabulary, empty or duplicate word.
        DataError: shapes that disagree, or embeddings that are not finite unit vectors.
    """

    names: tuple
    base_mask: torch.Tensor
    embeddings: torch.Tensor
    teacher: Fingerprint
    templates: str
    category_ids: tuple[int | str, ...] | None = field(default=None)
    synonyms: tuple | None = None
    templates_sha256: str | None = None
    thresholds: tuple[float | None, ...] | None = None
    name_embeddings: torch.Tensor | None = None
    name_words: torch.Tensor | None = None

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "base_mask", torch.as_tensor(self.base_mask, dtype=torch.bool))
        if self.category_ids is not None:
            object.__setattr__(self, "category_ids", tuple(self.category_ids))
        if self.synonyms is not None:
            object.__setattr__(self, "synonyms", tuple(map(tuple, self.synonyms)))
        if self.templates_sha256 is None:
            object.__setattr__(self, "templates_sha256", _sha_of_known_set(self.templates))
        check_words(self.names)
        k = len(self.names)
        if self.embeddings.ndim != 2 or len(self.embeddings) != k or self.base_mask.shape != (k,):
            raise DataError(
                f"a vocabulary of {k} words has embeddings of shape {list(self.embeddings.shape)} and a base mask of "
                f"shape {list(self.base_mask.shape)}: give one row and one mask entry per word."
            )
        norms = self.embeddings.norm(dim=1)
        wrong = torch.nonzero(~((norms - 1).abs() < 1e-3)).flatten().tolist()  # NaN fails the comparison too
        if wrong:
            raise DataError(
                f"the embedding of {self.names[wrong[0]]!r} (row {wrong[0]}) has norm {norms[wrong[0]]:.4f}, not 1."
            )
        if self.category_ids is not None and len(self.category_ids) != k:
            raise DataError(f"{k} words but {len(self.category_ids)} category ids.")
        if self.synonyms is not None and len(self.synonyms) != k:
            raise DataError(f"{k} words but {len(self.synonyms)} lists of synonyms.")
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", checked_thresholds(self.thresholds, k))
        _check_names(self.name_embeddings, self.name_words, k, self.embeddings.shape[1])

    def __len__(self):
        return len(self.names)

    @property
    def num_base(self) -> int:
        """B, the number of base words."""
        return int(self.base_mask.sum())

    @property
    def pooling(self) -> str | None:
        """How the names of a word are joined: "mean" of embeddings, "max" of scores; None without synonyms."""
        if self.name_embeddings is not None:
            return "max"
        return None if self.synonyms is None else "mean"

    @property
    def names_sha256(self) -> str:
        """Hash of the words in their order."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()

    @property
    def synonyms_sha256(self) -> str | None:
        """Hash of the names averaged for each word; None without synonyms."""
        if self.synonyms is None:
            return None
        return hashlib.sha256("\n".join("\t".join(names) for names in self.synonyms).encode()).hexdigest()

    def base(self) -> Vocabulary:
        """The vocabulary of the base words only, in order."""
        return self.select(self.base_mask)

    def select(self, mask: Tensor) -> Vocabulary:
        """The sub-vocabulary of a boolean mask [K]."""
        return self.selected(torch.nonzero(mask).flatten().tolist())

    def selected(self, rows: Sequence[int]) -> Vocabulary:
        """The words at some positions, in that order."""
        rows = list(rows)
        name_embeddings, name_words = self.name_embeddings, self.name_words
        if name_embeddings is not None and name_words is not None:
            at, name_words = _names_of(name_words, rows, len(self))
            name_embeddings = name_embeddings[at]
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            base_mask=self.base_mask[rows],
            embeddings=self.embeddings[rows],
            category_ids=self.category_ids and tuple(self.category_ids[row] for row in rows),
            synonyms=self.synonyms and tuple(self.synonyms[row] for row in rows),
            thresholds=self.thresholds and tuple(self.thresholds[row] for row in rows),
            name_embeddings=name_embeddings,
            name_words=name_words,
        )

    def joined(self, others: Vocabulary) -> Vocabulary:
        """This vocabulary followed by the words of ``others``, of the same teacher; their category ids become -1, -2,
        ..."""
        ids = self.category_ids and (*self.category_ids, *range(-1, -1 - len(others), -1))
        synonyms = thresholds = None
        if self.synonyms or others.synonyms:
            pairs = ((words.synonyms or ((name,) for name in words.names)) for words in (self, others))
            synonyms = tuple(names for part in pairs for names in part)
        if self.thresholds or others.thresholds:
            thresholds = tuple(each for part in (self, others) for each in part.thresholds or (None,) * len(part))
        name_embeddings = name_words = None
        if "max" in (self.pooling, others.pooling):
            rows, words = zip(*(part.name_rows() for part in (self, others)))
            name_embeddings, name_words = torch.cat(rows), torch.cat([words[0], words[1] + len(self)])
        return replace(
            self,
            names=(*self.names, *others.names),
            base_mask=torch.cat([self.base_mask, others.base_mask]),
            embeddings=torch.cat([self.embeddings, others.embeddings]),
            category_ids=ids,
            synonyms=synonyms,
            thresholds=thresholds,
            name_embeddings=name_embeddings,
            name_words=name_words,
        )

    def name_rows(self) -> tuple[Tensor, Tensor]:
        """(rows [M, D] whose scores are compared, word [M] of each): of all names, or ``embeddings`` without "max"."""
        if self.name_embeddings is None or self.name_words is None:
            return self.embeddings, torch.arange(len(self))
        return self.name_embeddings, self.name_words

    def pooled(self, pooling: str | None) -> Vocabulary:
        """This vocabulary with the names of its words joined by "mean" or "max"; None: unchanged.

        Raises:
            UsageError: an unknown pooling, or "max" for averaged names, whose separate embeddings are not known.
        """
        if pooling is None:
            return self
        require_pooling(pooling)
        if pooling == "mean":
            return replace(self, name_embeddings=None, name_words=None)
        if self.pooling == "mean":
            raise UsageError(
                "this vocabulary holds the mean over the names of each word: for their maximum, give the names, or build "
                "the file with ovdet2 vocab --pooling max."
            )
        return self

    def manifest(self) -> dict[str, Any]:
        """JSON-serialisable description: words, templates, hashes, and the teacher's fingerprint."""
        return {
            "schema": SCHEMA,
            "names": list(self.names),
            "category_ids": None if self.category_ids is None else list(self.category_ids),
            "templates": self.templates,
            "templates_sha256": self.templates_sha256,
            "names_sha256": self.names_sha256,
            "synonyms": None if self.synonyms is None else list(map(list, self.synonyms)),
            "synonyms_sha256": self.synonyms_sha256,
            "teacher": self.teacher.to_dict(),
            **({} if self.thresholds is None else {"thresholds": list(self.thresholds)}),
        }

    def save(self, path: str | Path) -> None:
        """Write the vocabulary file (safetensors, schema 1)."""
        tensors = {"embeddings": self.embeddings.float(), "base_mask": self.base_mask}
        if self.name_embeddings is not None and self.name_words is not None:
            tensors |= {_NAME_ROWS: self.name_embeddings.float(), _NAME_WORDS: self.name_words}
        write_safetensors(path, tensors, self.manifest())

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary file. Raises :class:`DataError` if it is missing, damaged or inconsistent."""
        tensors, manifest = read_safetensors(path, SCHEMA, remedy="build it with ovdet2 vocab")
        try:
            vocabulary = _from_parts(manifest, tensors["base_mask"], tensors["embeddings"], path)
            if _NAME_ROWS in tensors:
                rows, words = tensors[_NAME_ROWS], tensors[_NAME_WORDS]
                vocabulary = replace(vocabulary, name_embeddings=rows, name_words=words)
        except (KeyError, OVDetError) as error:
            reason = f"it has no {error}." if isinstance(error, KeyError) else error
            raise DataError(f"{path}: {reason} Rebuild it with ovdet2 vocab.") from None
        stated = manifest.get("names_sha256"), manifest.get("synonyms_sha256")  # None in files of earlier versions
        if (vocabulary.names_sha256, vocabulary.synonyms_sha256) != stated:
            raise DataError(f"{path}: its words were changed after it was written. Rebuild it with ovdet2 vocab.")
        return vocabulary

    @classmethod
    def build(
        cls,
        names: Iterable[str],
        teacher: Teacher,
        templates: str | Path = "vild63",
        base_mask: Sequence[bool] | Tensor | None = None,
        category_ids: Iterable[int | str] | None = None,
        progress: bool = False,
        synonyms: Iterable[Iterable[str]] | None = None,
        pooling: str = "mean",
    ) -> Vocabulary:
        """Embed words: normalise each prompt's embedding, average over the templates, normalise again (ViLD, F-VLM).

        With synonyms a word's embedding is the normalised mean of these embeddings over its names. The file name of
        ViLD's published LVIS classifier ("clip_synonym_prompt") implies that it averages synonyms; the order of
        normalisation is not published. The tables of Detic and F-VLM use the first name only.

        Args:
            names: K words.
            teacher: embeds the prompts.
            templates: template set name, or a template file.
            base_mask: [K] bool; default: every word is novel.
            category_ids: optional K ids.
            progress: show a progress bar.
            synonyms: optional K lists of further names; a name that cleans to an earlier one is skipped.
            pooling: "mean" averages the embeddings of a word's names; with "max" the names keep their embeddings, and a
                word's logit is the maximum over them.

        Raises:
            UsageError: no word, an empty or duplicate word, an empty synonym, an unknown template set or pooling.
            DataError: the template file cannot be read.
        """
        names = tuple(names)
        check_words(names)
        require_pooling(pooling)
        averaged = averaged_names(names, synonyms)
        rows = _embed_names([name for group in averaged for name in group], teacher, templates, progress)
        word = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(group) for group in averaged]))
        several = len(rows) > len(names)
        sums = torch.zeros(len(names), rows.shape[1]).index_add_(0, word, rows)
        return cls(
            names,
            _mask(base_mask, len(names)),
            F.normalize(sums, dim=1),  # normalising a sum and a mean is the same
            teacher.fingerprint,
            set_title(templates),
            None if category_ids is None else tuple(category_ids),
            averaged if several else None,
            templates_sha256(templates),
            name_embeddings=rows if several and pooling == "max" else None,
            name_words=word if several and pooling == "max" else None,
        )

    @classmethod
    def from_table(
        cls,
        names: Iterable[str],
        table: ArrayLike,
        teacher: Fingerprint,
        templates: str,
        base_mask: Sequence[bool] | Tensor | None = None,
        category_ids: Iterable[int | str] | None = None,
    ) -> Vocabulary:
        """Make a vocabulary of an external embedding table; the rows are normalised here.

        Args:
            names: K words in row order.
            table: array [K, D], any float type, no zero row.
            teacher: stated by the user, with ``weights_sha256`` None.
            templates: the user's description of the prompts.

        Raises:
            DataError: the row count differs from the number of words, or a row is zero or not finite.
        """
        names = tuple(names)
        rows = torch.from_numpy(np.array(table, dtype=np.float32))
        if rows.ndim != 2 or len(rows) != len(names):
            raise DataError(
                f"the table has shape {list(rows.shape)} but there are {len(names)} words: give one row per word."
            )
        for fault, wrong in (("not finite", ~rows.isfinite().all(1)), ("zero", (rows == 0).all(1))):
            at = torch.nonzero(wrong).flatten().tolist()
            if at:
                raise DataError(
                    f"the embedding of {names[at[0]]!r} (row {at[0]} of the table) is {fault}; such rows: {len(at)}. "
                    "Make the table again, or remove these words."
                )
        ids = None if category_ids is None else tuple(category_ids)
        return cls(names, _mask(base_mask, len(names)), F.normalize(rows, dim=1), teacher, templates, ids)


def require_pooling(pooling: str) -> None:
    """Raise :class:`UsageError` for anything but "mean" and "max"."""
    if pooling not in POOLINGS:
        raise UsageError(f"the names of a word are joined by {pooling!r}: choose one of {', '.join(POOLINGS)}.")


def checked_thresholds(thresholds: Sequence[Any], count: int) -> tuple[float | None, ...]:
    """K thresholds as a tuple.

    Raises:
        DataError: another number of them than ``count``, or one that is neither None nor a number in [0, 1].
    """
    thresholds = tuple(thresholds)
    if len(thresholds) != count:
        raise DataError(f"{count} words but {len(thresholds)} thresholds.")
    for row, value in enumerate(thresholds):
        if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
            raise DataError(f"the threshold of word {row} is {value!r}, not a number from 0 to 1.")
    return tuple(None if value is None else float(value) for value in thresholds)


def _check_names(rows: Tensor | None, words: Tensor | None, count: int, dim: int) -> None:
    """Raise :class:`DataError` unless there is a unit row [M, D] for each name and each word has one."""
    if rows is None and words is None:
        return
    damaged = DataError(f"the embeddings of the names do not belong to the {count} words of {dim} dimensions.")
    if rows is None or words is None or rows.ndim != 2 or rows.dtype not in _FLOATS or words.dtype != torch.int64:
        raise damaged
    if rows.shape[1] != dim or words.shape != (len(rows),) or not len(words):
        raise damaged
    steps = words.diff()  # every word has a name, so the words ascend by steps of 0 and 1
    if words[0] != 0 or words[-1] != count - 1 or not bool(((steps == 0) | (steps == 1)).all()):
        raise damaged
    if not bool(((rows.norm(dim=1) - 1).abs() < 1e-3).all()):
        raise DataError("an embedding of a name does not have norm 1.")


def _names_of(name_words: Tensor, words: list[int], count: int) -> tuple[Tensor, Tensor]:
    """(positions in ``name_words`` of the names of some words, their words 0, 1, ... in the order given)."""
    counts = torch.bincount(name_words, minlength=count)
    first = counts.cumsum(0) - counts
    chosen = counts[words]  # names of each
    new = torch.repeat_interleave(torch.arange(len(words)), chosen)
    within = torch.arange(len(new)) - (chosen.cumsum(0) - chosen)[new]
    return first[words][new] + within, new


def _mask(base_mask: Sequence[bool] | Tensor | None, count: int) -> Tensor:
    """The base mask as a Tensor; None: every word is novel."""
    if base_mask is None:
        return torch.zeros(count, dtype=torch.bool)
    return torch.as_tensor(base_mask, dtype=torch.bool)


def check_words(names: Sequence[str]) -> None:
    """Raise :class:`UsageError` for an empty vocabulary, an empty word, or two words that clean to the same text."""
    repeated = repeated_words(names)
    if repeated:
        shown = ", ".join(
            f"{names[first]!r} and {names[i]!r} (words {first} and {i})" for i, first in repeated[:_SHOWN]
        )
        more = f", and {len(repeated) - _SHOWN} more" if len(repeated) > _SHOWN else ""
        raise UsageError(f"the vocabulary holds the same word twice: {shown}{more}. Remove one of each pair.")


def repeated_words(names: Sequence[str]) -> list[tuple[int, int]]:
    """The words that clean to the same text as an earlier word: [(position, position of the first such word)].

    Raises:
        UsageError: no word, or an empty one.
    """
    if not names:
        raise UsageError("the vocabulary is empty: give at least one word.")
    seen, repeated = {}, []
    for position, name in enumerate(names):
        cleaned = clean_name(name)
        if not is_visible(cleaned):
            raise UsageError(f"word {position} of the vocabulary is empty ({name!r}): remove it.")
        first = seen.setdefault(cleaned, position)
        if first != position:
            repeated.append((position, first))
    return repeated


def averaged_names(
    names: Sequence[str], synonyms: Iterable[Iterable[str]] | None = None
) -> tuple[tuple[str, ...], ...]:
    """K tuples of the names of each class that differ after cleaning, the class name first.

    Raises:
        UsageError: an empty synonym, or not one list of synonyms per word.
    """
    if synonyms is None:
        return tuple((name,) for name in names)
    synonyms = tuple(map(tuple, synonyms))
    if len(synonyms) != len(names):
        raise UsageError(f"there are {len(names)} words but {len(synonyms)} lists of synonyms: give one list per word.")
    groups = []
    for name, others in zip(names, synonyms):
        known = {}
        for text in (name, *others):
            known.setdefault(clean_name(text), text)
        if "" in known:
            raise UsageError(f"a synonym of {name!r} is empty ({known['']!r}): remove it.")
        groups.append(tuple(known.values()))
    return tuple(groups)


def _embed_names(names, teacher, templates, progress):
    """Tensor [M, D] on the CPU: the unit embedding of each name over a template set."""
    count = len(get_templates(templates))
    step = max(1, PROMPTS_AT_ONCE // count)  # names per chunk, which bounds the memory for any M
    rows = []
    with progress_bar(total=len(names), desc="embedding words", unit="word", disable=not progress) as bar:
        for start in range(0, len(names), step):
            chunk = names[start : start + step]
            encoded = teacher.encode_text([text for name in chunk for text in render(name, templates)])
            rows.append(F.normalize(encoded.view(len(chunk), count, -1).mean(dim=1), dim=1).cpu())
            bar.update(len(chunk))
    return torch.cat(rows)


def _sha_of_known_set(templates):
    """Hash of a known template set; None for a user's description of the prompts of an imported table."""
    return templates_sha256(templates) if templates in template_set_names() else None


def manifest_bytes(vocabulary: Vocabulary, further_trained: Iterable[str] = ()) -> torch.Tensor:
    """The manifest as a uint8 tensor, so that a checkpoint can hold it next to the embeddings.

    Args:
        vocabulary: :class:`Vocabulary`.
        further_trained: cleaned names of words that had training boxes, besides the base words.
    """
    further = {_FURTHER: sorted(further_trained)} if further_trained else {}
    text = json.dumps(vocabulary.manifest() | further, ensure_ascii=False)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()


def further_trained_names(manifest: torch.Tensor) -> frozenset[str]:
    """Cleaned names of the words that had training boxes besides the base words; reads :func:`manifest_bytes`.

    Raises:
        ValueError: the bytes are damaged.
    """
    names = _manifest_of(manifest).get(_FURTHER, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{_FURTHER} is no list of words")
    return frozenset(map(clean_name, names))


def from_buffers(embeddings: torch.Tensor, base_mask: torch.Tensor, manifest: torch.Tensor) -> Vocabulary:
    """The vocabulary of ``embeddings``, ``base_mask`` and :func:`manifest_bytes` that a checkpoint holds."""
    return _from_parts(_manifest_of(manifest), base_mask.cpu(), embeddings.cpu().float(), "the checkpoint's vocabulary")


def _manifest_of(buffer):
    return json.loads(bytes(buffer.cpu().tolist()).decode())


def _from_parts(manifest, base_mask, embeddings, source):
    fault = fault_of(manifest, _FORM)
    if not fault and any(type(value) not in (int, str) for value in manifest["category_ids"] or ()):
        fault = "category_ids holds what is neither a whole number nor a text"
    if not fault and (embeddings.dtype not in _FLOATS or base_mask.dtype != torch.bool):
        fault = f"the embeddings are {embeddings.dtype} and the base mask is {base_mask.dtype}"
    if fault:
        raise DataError(f"the manifest is damaged: {fault}.")
    teacher = Fingerprint.from_dict(manifest.get("teacher"), source)
    return Vocabulary(
        manifest["names"],
        base_mask,
        embeddings,
        teacher,
        manifest["templates"],
        manifest["category_ids"],
        manifest.get("synonyms"),
        manifest.get("templates_sha256"),
        manifest.get("thresholds"),
    )
