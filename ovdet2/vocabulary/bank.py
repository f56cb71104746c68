"""The word bank of a detector: its vocabulary as buffers, which are saved in checkpoints and can be replaced.

Shapes: K words, B base words, M names of all words, D embedding dimension.
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
_SHOWN = 5  # words in a message


class WordBank(nn.Module):
    """Holds the :class:`~ovdet2.vocabulary.Vocabulary` of a detector; the number of words K may change at any time.

    It also stores the names of the words that had training boxes. A checkpoint holds them: the base words of the
    training that wrote it, and those of earlier trainings of the weights. Words given to :meth:`set` are base if and
    only if they had training boxes. Words given to the constructor keep the base mask of their data set's split, as
    the evaluation protocol requires; only a split without base words (a transfer target) takes the mask of training.
    The evaluation report lists novel words of the split that had training boxes under ``novel_words_trained_on``.

    Attributes:
        words: the :class:`Vocabulary`.
        num_detectable: number of the first words, which can be detected; the others compete with them for the probability
            of a region, and are never detected. K without competitors, see :meth:`set`.
        num_negative: number of the words after them that are negative words of the user; competitors follow.
        embeddings: Tensor [K, D] float32, unit rows.
        base_mask: Tensor [K] bool.
        background: Tensor [D], unit embedding of the word "background"; None for a detector that does not need it.
        trained_base_names: frozenset of the cleaned names of the words that had training boxes; before weights are
            loaded, of the base words.
        from_checkpoint: whether ``trained_base_names`` come from a checkpoint.
    """

    words: Vocabulary
    num_detectable: int
    num_negative: int
    name_rows: Tensor | None
    name_words: Tensor | None
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
            background: Tensor [D], the teacher's unit embedding of the word "background", for a detector that has a
                background column; None for other detectors.
        """
        super().__init__()
        for name in ("embeddings", "base_mask", "manifest", "background"):
            self.register_buffer(name, None)
        for name in ("name_rows", "name_words"):  # a checkpoint holds the mean of a word's names
            self.register_buffer(name, None, persistent=False)
        self._store(vocabulary, background)
        self.trained_base_names = base_names(vocabulary)
        self.from_checkpoint = False

    def __len__(self) -> int:
        return len(self.words)

    @property
    def names(self) -> tuple[str, ...]:
        """K words; class index i is the i-th of them."""
        return self.words.names

    @property
    def num_base(self) -> int:
        """B, the number of base words."""
        return self.words.num_base

    @property
    def teacher(self) -> Fingerprint:
        """Fingerprint of the model that embedded the words."""
        return self.words.teacher

    def rows(self, training: bool) -> Tensor:
        """Embeddings for cosines; :meth:`best_names` makes logits of words of them.

        Tensor [B, D] of the base words in training (see :attr:`training_embeddings`); at test [K, D] of all words, or
        [M, D] of all their names, if a word's logit is the maximum over its names.
        """
        if training:
            return self.training_embeddings
        return self.embeddings if self.name_rows is None else self.name_rows

    def best_names(self, logits: Tensor) -> Tensor:
        """Logits of words from logits of :meth:`rows` at test: the maximum over the names of each word.

        Args:
            logits: Tensor [..., M], or with further columns such as a background, which are kept.

        Returns:
            Tensor [..., K] or with the further columns; the same Tensor unless the vocabulary is pooled by maximum.
        """
        if self.name_words is None:
            return logits
        names, others = logits[..., : len(self.name_words)], logits[..., len(self.name_words) :]
        lowest = names.new_full((*names.shape[:-1], len(self)), -torch.inf)
        best = lowest.scatter_reduce(-1, self.name_words.expand_as(names), names, "amax")
        return torch.cat([best, others], dim=-1) if others.shape[-1] else best

    @property
    def training_embeddings(self) -> Tensor:
        """Tensor [B, D]: embeddings of the base words, the only classes in training.

        Raises:
            UsageError: no base word, or a novel word before a base word, which would shift contiguous class ids.
        """
        count = self.num_base
        if count == 0 or not bool(self.words.base_mask[:count].all()):
            raise UsageError(f"training needs base words first, but the base mask is {self.words.base_mask.tolist()}.")
        return self.embeddings[:count]

    def set(
        self,
        vocabulary: Vocabulary,
        background: Tensor | None = None,
        competitors: Vocabulary | None = None,
        negative: Vocabulary | None = None,
    ) -> None:
        """Replace the words. Words that had training boxes become base; the vocabulary's base mask is ignored.

        Args:
            vocabulary: :class:`Vocabulary`.
            background: Tensor [D] as in the constructor; None keeps the current one, which is correct if the prompts
                are the same.
            competitors: further words, which are never detected: see :attr:`num_detectable`.
            negative: further words, which are not detected either. With a softmax they are competitors; where each word
                has a separate sigmoid, a box whose best word is one of them is dropped.

        Raises:
            UsageError: ``vocabulary`` is no :class:`Vocabulary`.
            DataError: its teacher or D differs from the current one.
        """
        if not isinstance(vocabulary, Vocabulary):
            raise UsageError(f"expected a Vocabulary, got {type(vocabulary).__name__}.")
        require_same_teacher(self.teacher, "the model", vocabulary.teacher, "the new vocabulary")
        if vocabulary.embeddings.shape[1] != self.embeddings.shape[1]:
            raise DataError(
                f"the new vocabulary has {vocabulary.embeddings.shape[1]} dimensions, the model "
                f"{self.embeddings.shape[1]}: embed the words with the model's teacher."
            )
        count = len(vocabulary)
        for what, others in (("the negative words", negative), ("the competitors", competitors)):
            if others is not None and len(others):
                require_same_teacher(self.teacher, "the model", others.teacher, what)
                vocabulary = vocabulary.joined(others)
        self._store(self._with_trained_mask(vocabulary), background)
        self.num_detectable, self.num_negative = count, 0 if negative is None else len(negative)

    def on_negative_words(self, scores: Tensor) -> Tensor:
        """Whether the best word of a region is a negative one, for scores that are sigmoids.

        Args:
            scores: Tensor [..., K or K + 1], scores or logits, of all words and perhaps a background.

        Returns:
            Tensor [...] bool; False for a tie, and everywhere without negative words.
        """
        if not self.num_negative:
            return torch.zeros(scores.shape[:-1], dtype=torch.bool, device=scores.device)
        words = scores[..., : self.num_detectable].amax(dim=-1)
        return scores[..., self.num_detectable : self.num_detectable + self.num_negative].amax(dim=-1) > words

    def confirm_teacher(self, teacher: Fingerprint) -> None:
        """Record the teacher of the words by its weights, after it was compared with their embeddings."""
        count = self.num_detectable
        self._store(replace(self.words, teacher=teacher))
        self.num_detectable = count

    def adopt_saved_vocabulary(self, saved: Mapping[str, Tensor]) -> None:
        """Check the vocabulary of a checkpoint, and store which words had training boxes (see the class).

        The vocabulary of this run is not replaced.

        Args:
            saved: the checkpoint's "embeddings", "base_mask" and "manifest"; empty: does nothing.

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
                f"the checkpoint was trained with embeddings of {trained.embeddings.shape[1]} dimensions, but those of "
                f"this run have {self.embeddings.shape[1]}: set MODEL.VOCABULARY.FILE to the table of that training."
            )
        self.trained_base_names = base_names(trained) | earlier
        self.from_checkpoint = True
        if self.num_base == 0:
            self._store(self._with_trained_mask(self.words))
            logger.info("%d of %d words were base classes in training, by name.", self.num_base, len(self))
        elif self.training and (further := sorted(self.trained_base_names - base_names(self.words))):
            logger.info(
                "%d words that had training boxes are not among the %d base words of this run. The detector remembers them "
                "as base words (%s%s).",
                len(further), self.num_base, ", ".join(further[:_SHOWN]), ", ..." * (len(further) > _SHOWN),
            )  # fmt: skip

    def _with_trained_mask(self, vocabulary: Vocabulary) -> Vocabulary:
        trained = [clean_name(name) in self.trained_base_names for name in vocabulary.names]
        return replace(vocabulary, base_mask=torch.tensor(trained))

    def _store(self, vocabulary: Vocabulary, background: Tensor | None = None) -> None:
        device = self.embeddings.device if self.embeddings is not None else None
        self.words, self.num_detectable, self.num_negative = vocabulary, len(vocabulary), 0
        self.embeddings = vocabulary.embeddings.float().to(device)
        self.name_rows = self.name_words = None
        if vocabulary.pooling == "max":
            rows, words = vocabulary.name_rows()
            self.name_rows, self.name_words = rows.float().to(device), words.to(device)
        self.base_mask = vocabulary.base_mask.to(device)
        self.manifest = manifest_bytes(vocabulary).to(device)
        if background is not None:
            self.background = background.float().to(device)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Save the buffers, with the names of further trained words added to the saved manifest.

        The manifest buffer does not hold these names: its length must depend on the words only, so that DDP can
        broadcast it between copies of the model.
        """
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
