"""The word bank of a detector: its vocabulary as buffers, moved with it, saved in its checkpoints, replaced at will.

Shapes: K words, B base words, D embedding dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ovdet2.errors import DataError, UsageError
from ovdet2.vlm.fingerprint import Fingerprint, require_same_teacher
from ovdet2.vocabulary import Vocabulary, from_buffers, further_trained_names, manifest_bytes
from ovdet2.vocabulary.templates import clean_name

logger = logging.getLogger(__name__)


class WordBank(nn.Module):
    """Holds the words that a detector detects, one :class:`~ovdet2.vocabulary.Vocabulary`; K may change at any time.

    It also remembers by name which words had training boxes. A checkpoint states them: the base words of the training
    that wrote it, and those that the weights knew before. Words that come without a data set, by :meth:`set`, are base
    if and only if they had training boxes. Words of a data set, those of the constructor, keep the base mask of its
    split, which is the evaluation protocol, and only a split without base words takes the mask of training; the report
    lists the other words that had boxes under ``novel_words_trained_on``.

    Attributes:
        words: the :class:`Vocabulary`.
        embeddings: Tensor [K, D] float32, unit rows.
        base_mask: Tensor [K] bool.
        background: Tensor [D], unit embedding of the word "background"; None for a detector that does not need it.
        trained_base_names: cleaned names of the words that had training boxes, a frozenset; before weights are loaded,
            of the base words.
        from_checkpoint: whether ``trained_base_names`` come from a checkpoint.
    """

    words: Vocabulary
    embeddings: Tensor
    base_mask: Tensor
    manifest: Tensor
    background: Tensor | None
    trained_base_names: frozenset[str]
    from_checkpoint: bool

    def __init__(self, vocabulary: Vocabulary, background: Tensor | None = None) -> None:
        """
        Args:
            vocabulary: :class:`Vocabulary`, with the base mask of its data set.
            background: Tensor [D], the teacher's unit embedding of the word "background", for a detector that has it as
                a column; None for the others.
        """
        super().__init__()
        for name in ("embeddings", "base_mask", "manifest", "background"):
            self.register_buffer(name, None)
        self._store(vocabulary, background)
        self.trained_base_names = base_names(vocabulary)
        self.from_checkpoint = False

    def __len__(self) -> int:
        return len(self.words)

    @property
    def names(self) -> tuple[str, ...]:
        """K words, which class indices point to."""
        return self.words.names

    @property
    def num_base(self) -> int:
        """B."""
        return self.words.num_base

    @property
    def teacher(self) -> Fingerprint:
        """Of the model that embedded the words."""
        return self.words.teacher

    def rows(self, training: bool) -> Tensor:
        """Tensor [B, D] of the base words in training, [K, D] of all words at test; see :attr:`training_embeddings`."""
        return self.training_embeddings if training else self.embeddings

    @property
    def training_embeddings(self) -> Tensor:
        """Tensor [B, D]: rows of the base words, the only columns that exist in training.

        Raises:
            UsageError: no base word, or a novel word before a base one: contiguous class ids would be shifted.
        """
        count = self.num_base
        if count == 0 or not bool(self.words.base_mask[:count].all()):
            raise UsageError(f"training needs base words first, but the base mask is {self.words.base_mask.tolist()}.")
        return self.embeddings[:count]

    def set(self, vocabulary: Vocabulary, background: Tensor | None = None) -> None:
        """Replace the words; those that had training boxes are the base words, whatever the vocabulary's mask is.

        Args:
            vocabulary: :class:`Vocabulary`.
            background: Tensor [D] as in the constructor; None keeps the present one, which is right for words in the
                same prompts.

        Raises:
            UsageError: no :class:`Vocabulary`.
            DataError: other teacher or other D than the present one.
        """
        if not isinstance(vocabulary, Vocabulary):
            raise UsageError(f"expected a Vocabulary, got {type(vocabulary).__name__}.")
        require_same_teacher(self.teacher, "the model", vocabulary.teacher, "the new vocabulary")
        if vocabulary.embeddings.shape[1] != self.embeddings.shape[1]:
            raise DataError(
                f"the new vocabulary has {vocabulary.embeddings.shape[1]} dimensions, the model "
                f"{self.embeddings.shape[1]}: embed the words with the model's teacher."
            )
        self._store(self._with_trained_mask(vocabulary), background)

    def adopt_saved_vocabulary(self, saved: Mapping[str, Tensor]) -> None:
        """Compare with what a checkpoint holds; the vocabulary of this run stays (architecture.md, contract 13).

        The words that had training boxes are remembered, see the class.

        Args:
            saved: the checkpoint's "embeddings", "base_mask" and "manifest"; empty: nothing to compare.

        Raises:
            DataError: the checkpoint was trained in another embedding space, or its entries are damaged.
        """
        if not saved:
            return
        try:
            trained = from_buffers(saved["embeddings"], saved["base_mask"], saved["manifest"])
            earlier = further_trained_names(saved["manifest"])
        except (KeyError, ValueError) as error:
            raise DataError(
                f"the checkpoint's vocabulary cannot be read ({error}): it is damaged or not ovdet2's."
            ) from None
        require_same_teacher(trained.teacher, "the checkpoint", self.teacher, "the vocabulary of this run")
        if trained.embeddings.shape[1] != self.embeddings.shape[1]:
            raise DataError(
                f"the checkpoint was trained with embeddings of {trained.embeddings.shape[1]} dimensions, that of "
                f"this run has {self.embeddings.shape[1]}: give MODEL.VOCABULARY.FILE the table of that training."
            )
        self.trained_base_names = base_names(trained) | earlier
        self.from_checkpoint = True
        if self.num_base == 0:
            self._store(self._with_trained_mask(self.words))
            logger.info("%d of %d words were base classes in training, by name.", self.num_base, len(self))

    def _with_trained_mask(self, vocabulary: Vocabulary) -> Vocabulary:
        trained = [clean_name(name) in self.trained_base_names for name in vocabulary.names]
        return replace(vocabulary, base_mask=torch.tensor(trained))

    def _store(self, vocabulary: Vocabulary, background: Tensor | None = None) -> None:
        device = self.embeddings.device if self.embeddings is not None else None
        self.words = vocabulary
        self.embeddings = vocabulary.embeddings.float().to(device)
        self.base_mask = vocabulary.base_mask.to(device)
        self.manifest = manifest_bytes(vocabulary).to(device)
        if background is not None:
            self.background = background.float().to(device)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """As usual, with the names of further trained words in the manifest. The buffer does not have them: its length
        then depends on the words alone, and the copies of a model can exchange buffers."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        further = self.trained_base_names - base_names(self.words)
        if further:
            destination[f"{prefix}manifest"] = manifest_bytes(self.words, further).to(self.manifest.device)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{len(self)} words, {self.num_base} base, teacher {self.teacher}"


def base_names(vocabulary: Vocabulary) -> frozenset[str]:
    """The cleaned names of the base words."""
    pairs = zip(vocabulary.names, vocabulary.base_mask.tolist())
    return frozenset(clean_name(name) for name, is_base in pairs if is_base)
