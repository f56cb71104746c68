"""A queue of caption embeddings: negatives of earlier steps, in the checkpoint.

Shapes: T captions, Q places, D embedding dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ovdet2.modeling.contrastive import gather_rows

NO_IMAGE = -(2**63)  # the id of an empty place; image ids may be any other integer


class CaptionQueue(nn.Module):
    """The latest Q captions with their image ids, first in, first out.

    Captions of all processes enter in the order of the processes, so every process has the same queue, and the checkpoint
    of the first one resumes all.

    Attributes:
        embeddings: Tensor [Q, D] float32.
        ids: Tensor [Q] int64, NO_IMAGE where the place is empty.
        place: Tensor [] int64, the place of the next caption.
    """

    embeddings: Tensor
    ids: Tensor
    place: Tensor

    def __init__(self, size: int, dim: int) -> None:
        """
        Args:
            size: Q; 0: nothing is kept.
            dim: D.
        """
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), NO_IMAGE))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def columns(self, captions: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The captions of the step in all processes, then those of the queue; then the former enter the queue.

        A collective call.

        Args:
            captions: Tensor [T, D] of this process.
            ids: Tensor [T] int64, their images.

        Returns:
            (embeddings [T', D] float32, ids [T'] int64).
        """
        every = gather_rows(captions.reshape(-1, self.embeddings.shape[1]).to(self.embeddings))[0]
        every_ids = gather_rows(ids)[0]
        filled = self.ids != NO_IMAGE
        columns = torch.cat([every, self.embeddings[filled]]), torch.cat([every_ids, self.ids[filled]])
        self._push(every, every_ids)
        return columns

    def _push(self, captions: Tensor, ids: Tensor) -> None:
        size = len(self.ids)
        if not size:
            return
        captions, ids = captions[-size:], ids[-size:]
        places = (int(self.place) + torch.arange(len(ids), device=ids.device)) % size
        self.embeddings[places], self.ids[places] = captions, ids
        self.place.fill_((int(self.place) + len(ids)) % size)
