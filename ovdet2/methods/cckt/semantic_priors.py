"""Semantic priors of CCKT-Det: the words that exist in an image, added to the queries that look for them (Eq. 1).

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
    """The word that each query carries; an attachment of :class:`Queries`.

    Attributes:
        words: Tensor [B, N] int64, index into the words of the detector, -1 for none.
    """

    words: Tensor


def assign_words(counts: Tensor, num_queries: int, assignment: str = "blocks") -> Tensor:
    """Which of its image's words each query carries.

    With K words, "blocks" gives floor(N / K) consecutive queries to each word, and one more to the first N mod K words,
    from the queries at the end: the published code's rule, for learned queries, which have no order. "interleave" gives
    query i the word i mod K, for queries in order of objectness: blocks would leave the worst proposals to the last
    word. Of more than N words the first N are carried.

    Args:
        counts: Tensor [B] int64, words of each image; 0: its queries carry none.
        num_queries: N.
        assignment: one of :data:`ASSIGNMENTS`.

    Returns:
        Tensor [B, N] int64, the place of a query's word among those of its image; -1: none.
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
    """Adds a linear function of a word's embedding to the content of the queries that carry the word, once, before the
    decoder; positions and references stay."""

    def __init__(self, bank: WordBank, dim: int, assignment: str, gain: float = 1.0) -> None:
        """
        Args:
            bank: words of the detector, which are read and not owned.
            dim: C.
            assignment: see :func:`assign_words`.
            gain: factor of the projection's first weights, which are otherwise Xavier's.

        Raises:
            UsageError: another assignment.
        """
        super().__init__()
        if assignment not in ASSIGNMENTS:
            raise UsageError(
                f"the words of an image are assigned by {' or '.join(ASSIGNMENTS)}, not {assignment!r}: change "
                "MODEL.CCKT.ASSIGNMENT."
            )
        self._shared = (bank,)  # a tuple hides it from state_dict: the detector owns it
        self.assignment = assignment
        self.projection = nn.Linear(bank.embeddings.shape[1], dim)
        nn.init.xavier_uniform_(self.projection.weight, gain)
        nn.init.zeros_(self.projection.bias)

    def forward(self, queries: Queries, samples: Sequence[Sample]) -> Queries:
        """
        Args:
            queries: as the detector starts from them.
            samples: B samples with :class:`PresentWords`; the first count most if there are more than N.

        Returns:
            The queries with the priors in ``content`` and :class:`CarriedWords` attached.

        Raises:
            UsageError: a sample comes without its present words, or with one that the detector does not have.
        """
        bank = self._shared[0]
        rows = bank.training_embeddings if self.training else bank.embeddings
        words = [_words_of(sample, len(rows)) for sample in samples]
        # On the CPU, where the lists are: the device is told once what each query carries, and never asked.
        place = assign_words(
            torch.tensor([len(of_image) for of_image in words]), queries.content.shape[1], self.assignment
        )
        padded = pad_sequence([torch.cat([of_image, of_image.new_zeros(1)]) for of_image in words], batch_first=True)
        carried = padded.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
        device = queries.content.device
        padded, place, carried = (part.to(device, non_blocking=True) for part in (padded, place, carried))
        # Every image has a row, if only the padding's: the projection takes part in every step of every process.
        projected = self.projection(rows[padded].to(self.projection.weight.dtype))  # B x P x C
        added = projected.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, projected.shape[-1]))
        added = added.masked_fill(place[..., None] < 0, 0.0)
        return replace(queries, content=queries.content + added).attach(CarriedWords(carried))


def _words_of(sample, limit):
    present = sample.attachments.get(PresentWords)
    if present is None:
        raise UsageError(
            f"{sample.name} comes without its present words, which MODEL.CCKT.PRIORS needs: load the data with the "
            "steps of this configuration, or let Detector prepare the image."
        )
    words = present.words
    if len(words) and not 0 <= int(words.min()) <= int(words.max()) < limit:
        raise UsageError(
            f"the present words {words.tolist()} of {sample.name} are not below {limit}, the number of words (in "
            "training, of base words): they are of another vocabulary."
        )
    return words
