"""Semantic priors of CCKT-Det: embeddings of the words present in an image are added to its queries (Eq. 1).

Shapes: B images, N queries, P the most words of one image, C channels, D embedding dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ovdet2.data.samples import Sample
from ovdet2.errors import UsageError
from ovdet2.methods.cckt.sample import PresentWords
from ovdet2.modeling.detr.memory import Queries
from ovdet2.vocabulary.bank import WordBank

ASSIGNMENTS = ("blocks", "interleave")


@dataclass(frozen=True)
class CarriedWords:
    """The prior word of each query; an attachment of :class:`Queries`.

    Attributes:
        words: Tensor [B, N] int64, index into the vocabulary, -1 for none.
    """

    words: Tensor


def assign_words(counts: Tensor, num_queries: int, assignment: str = "blocks") -> Tensor:
    """Assign the present words of each image to its queries.

    With K words, "blocks" gives floor(N / K) consecutive queries to each word, and one more to the first N mod K words,
    from the queries at the end: the rule of the published code, for learned queries, which have no order. "interleave"
    gives query i the word i mod K, for queries sorted by objectness, where with blocks the last word would get the
    worst proposals. With more than N words only the first N are used.

    Args:
        counts: Tensor [B] int64, number of words of each image, 0 or more.
        num_queries: N.
        assignment: one of :data:`ASSIGNMENTS`.

    Returns:
        Tensor [B, N] int64, position of a query's word in the list of its image; -1: none.
    """
    query = torch.arange(num_queries, device=counts.device)
    words = counts[:, None].clamp(min=1, max=max(1, num_queries))
    if assignment == "interleave":
        place = query % words
    else:
        size = num_queries // words
        place = torch.where(query < size * words, query // size.clamp(min=1), query - size * words)
    return place.masked_fill(counts[:, None] == 0, -1)


class SemanticPriors(nn.Module):
    """Adds a linear projection of word embeddings to the content of the queries that they are assigned to, once, before
    the decoder; positions and references are unchanged."""

    def __init__(self, bank: WordBank, dim: int, assignment: str, gain: float = 1.0) -> None:
        """
        Args:
            bank: word bank of the detector; not a submodule of this module.
            dim: C.
            assignment: see :func:`assign_words`.
            gain: factor of the Xavier initialisation of the projection.

        Raises:
            UsageError: the assignment is unknown.
        """
        super().__init__()
        if assignment not in ASSIGNMENTS:
            raise UsageError(
                f"the words of an image are assigned by {' or '.join(ASSIGNMENTS)}, not {assignment!r}: change "
                "MODEL.CCKT.ASSIGNMENT."
            )
        self._shared = (bank,)  # a tuple hides it from state_dict: it is the detector's
        self.assignment = assignment
        self.projection = nn.Linear(bank.embeddings.shape[1], dim)
        nn.init.xavier_uniform_(self.projection.weight, gain)
        nn.init.zeros_(self.projection.bias)

    def forward(self, queries: Queries, samples: Sequence[Sample]) -> Queries:
        """
        Args:
            queries: input queries of the decoder.
            samples: B samples with :class:`PresentWords`; with more than N words the last ones are ignored.

        Returns:
            The queries with the priors added to ``content`` and :class:`CarriedWords` attached.

        Raises:
            UsageError: a sample has no present words attached, or a word is not in the detector's vocabulary.
        """
        bank = self._shared[0]
        rows = bank.training_embeddings if self.training else bank.embeddings
        words = [_words_of(sample, len(rows)) for sample in samples]
        # Computed on the CPU, where the lists are: one copy to the GPU and no synchronisation.
        place = assign_words(
            torch.tensor([len(of_image) for of_image in words]), queries.content.shape[1], self.assignment
        )
        padded = pad_sequence([torch.cat([of_image, of_image.new_zeros(1)]) for of_image in words], batch_first=True)
        carried = padded.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
        device = queries.content.device
        padded, place, carried = (part.to(device, non_blocking=True) for part in (padded, place, carried))
        # Each image has at least a padding row: DistributedDataParallel needs a gradient of the projection in every step.
        projected = self.projection(rows[padded].to(self.projection.weight.dtype))  # B x P x C
        added = projected.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, projected.shape[-1]))
        added = added.masked_fill(place[..., None] < 0, 0.0)
        return replace(queries, content=queries.content + added).attach(CarriedWords(carried))


def _words_of(sample, limit):
    present = sample.attachments.get(PresentWords)
    if present is None:
        raise UsageError(
            f"{sample.name} has no present words attached, which MODEL.CCKT.PRIORS requires: load the data with the "
            "steps of this configuration, or use Detector for this image."
        )
    words = present.words
    if len(words) and not 0 <= int(words.min()) <= int(words.max()) < limit:
        raise UsageError(
            f"the present words {words.tolist()} of {sample.name} must be below {limit}, the number of words (in "
            "training, of base words): they are of another vocabulary."
        )
    return words
