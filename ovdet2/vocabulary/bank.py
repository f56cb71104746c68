"""The vocabulary as buffers of the model: moved with it, saved in its checkpoints, replaced at will."""

import logging
from dataclasses import replace

import torch
from torch import nn

from ovdet2.errors import DataError, UsageError
from ovdet2.vlm.fingerprint import require_same_teacher
from ovdet2.vocabulary import Vocabulary, from_buffers, manifest_bytes
from ovdet2.vocabulary.templates import clean_name

logger = logging.getLogger(__name__)


class WordBank(nn.Module):
    """Holds one :class:`~ovdet2.vocabulary.Vocabulary`; K is free and may change at any time.

    Shapes: K words, B base words, D embedding dimension.
    """

    def __init__(self, vocabulary, background=None):
        """
        Args:
            vocabulary: :class:`Vocabulary`.
            background: Tensor [D], the teacher's unit embedding of the word "background", for a detector that has it as
                a column; None for the others.
        """
        super().__init__()
        for name in ("embeddings", "base_mask", "manifest", "background"):
            self.register_buffer(name, None)
        self._store(vocabulary, background)
        self.trained_base_names = base_names(vocabulary)
        self.from_checkpoint = False  # whether trained_base_names are those of a training, read from its checkpoint

    def set(self, vocabulary, background=None):
        """Replace the vocabulary.

        Args:
            vocabulary: :class:`Vocabulary`.
            background: Tensor [D] as in the constructor; None keeps the present one, which is right for words in the
                same prompts.

        Raises:
            DataError: other teacher or other D than the present one.
        """
        require_same_teacher(self.words.teacher, "the model", vocabulary.teacher, "the new vocabulary")
        if vocabulary.embeddings.shape[1] != self.embeddings.shape[1]:
            raise DataError(
                f"the new vocabulary has {vocabulary.embeddings.shape[1]} dimensions, the model "
                f"{self.embeddings.shape[1]}: embed the words with the model's teacher."
            )
        self._store(vocabulary, background)

    @property
    def training_embeddings(self):
        """Tensor [B, D]: rows of the base words, the only columns that exist in training.

        Raises:
            UsageError: no base word, or a novel word before a base one: contiguous class ids would be shifted.
        """
        count = self.words.num_base
        if count == 0 or not bool(self.words.base_mask[:count].all()):
            raise UsageError(f"training needs base words first, but the base mask is {self.words.base_mask.tolist()}.")
        return self.embeddings[:count]

    def adopt_saved_vocabulary(self, saved):
        """Compare with what a checkpoint holds; the vocabulary of this run stays (architecture.md, contract 13).

        The checkpoint's base words are remembered: a word given later counts as base if training saw boxes of it. In
        a vocabulary without base words, that of a transfer target, they are marked as base at once.

        Args:
            saved: dict with the checkpoint's "embeddings", "base_mask" and "manifest"; empty: nothing to compare.

        Raises:
            DataError: the checkpoint was trained in another embedding space.
        """
        if not saved:
            return
        try:
            trained = from_buffers(saved["embeddings"], saved["base_mask"], saved["manifest"])
        except (KeyError, ValueError) as error:
            raise DataError(
                f"the checkpoint's vocabulary cannot be read ({error}): it is damaged or not ovdet2's."
            ) from None
        require_same_teacher(trained.teacher, "the checkpoint", self.words.teacher, "the vocabulary of this run")
        if trained.embeddings.shape[1] != self.embeddings.shape[1]:
            raise DataError(
                f"the checkpoint was trained with embeddings of {trained.embeddings.shape[1]} dimensions, that of "
                f"this run has {self.embeddings.shape[1]}: give MODEL.VOCABULARY.FILE the table of that training."
            )
        self.trained_base_names = base_names(trained)
        self.from_checkpoint = True
        if self.words.num_base == 0:
            known = [clean_name(name) in self.trained_base_names for name in self.words.names]
            logger.info("%d of %d words were base classes in training, by name.", sum(known), len(known))
            self._store(replace(self.words, base_mask=torch.tensor(known)))

    def _store(self, vocabulary, background=None):
        device = self.embeddings.device if self.embeddings is not None else None
        if not isinstance(vocabulary, Vocabulary):
            raise UsageError(f"expected a Vocabulary, got {type(vocabulary).__name__}.")
        self.words = vocabulary
        self.embeddings = vocabulary.embeddings.float().to(device)
        self.base_mask = vocabulary.base_mask.to(device)
        self.manifest = manifest_bytes(vocabulary).to(device)
        if background is not None:
            self.background = background.float().to(device)

    def extra_repr(self):
        """Shown when the model is printed."""
        return f"{len(self.words)} words, {self.words.num_base} base, teacher {self.words.teacher}"


def base_names(vocabulary):
    """The cleaned names of the base words, a frozenset."""
    pairs = zip(vocabulary.names, vocabulary.base_mask.tolist())
    return frozenset(clean_name(name) for name, is_base in pairs if is_base)
