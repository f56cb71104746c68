"""Semantic priors of CCKT-Det: the words that exist in an image, added to the queries that look for them (Eq. 1).

Shapes: B images, N queries, P the most words of one image, C channels, D embedding dimension.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.targets import image_name

ASSIGNMENTS = ("blocks", "interleave")


def assign_words(counts, num_queries, assignment="blocks"):
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

    def __init__(self, vocabulary, dim, assignment, gain=1.0):
        """
        Args:
            vocabulary: :class:`~ovdet2.layers.WordBank` of the detector.
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
        self._shared = (vocabulary,)  # a tuple hides it from state_dict: the detector owns it
        self.assignment = assignment
        self.projection = nn.Linear(vocabulary.embeddings.shape[1], dim)
        nn.init.xavier_uniform_(self.projection.weight, gain)
        nn.init.zeros_(self.projection.bias)

    def forward(self, queries, records):
        """
        Args:
            queries: :class:`~ovdet2.modeling.detr.memory.Queries`.
            records: B records with "prior_words", Tensor [K] int64 on the CPU: indices of the base words in training,
                of the whole vocabulary at test; the first count most where there are more than N.

        Returns:
            :class:`Queries` with the priors in ``content`` and, in ``words``, the word each query carries.

        Raises:
            UsageError: a record has no "prior_words", or one that the vocabulary does not have.
        """
        vocabulary = self._shared[0]
        rows = vocabulary.training_embeddings if self.training else vocabulary.embeddings
        words = [_words_of(record, len(rows)) for record in records]
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
        return replace(queries, content=queries.content + added, words=carried)


def _words_of(record, limit):
    if "prior_words" not in record:
        raise UsageError(
            f"{image_name(record)} comes without prior_words, which MODEL.CCKT.PRIORS needs: use ovdet2's mapper, or "
            "Predictor, which find them."
        )
    words = record["prior_words"]
    if len(words) and not 0 <= int(words.min()) <= int(words.max()) < limit:
        raise UsageError(
            f"the prior words {words.tolist()} of {image_name(record)} are not below {limit}, the number of words (in "
            "training, of base words): they are of another vocabulary."
        )
    return words
