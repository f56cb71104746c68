"""Input queries of the decoder: learned ones, or the encoder's best proposals.

Shapes: B images, S tokens, N queries, C channels. Names: ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

import math

import torch
from torch import Tensor, nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.encoder import cell_centres
from ovdet2.modeling.detr.heads import BoxHead, in_full_precision
from ovdet2.modeling.detr.memory import EncoderOutputs, Memory, Queries
from ovdet2.modeling.detr.position_encoding import box_position


class LearnedQueries(nn.Module):
    """N learned queries, whose reference points are a linear function of their positions."""

    def __init__(self, dim: int, num_queries: int) -> None:
        """
        Args:
            dim: C.
            num_queries: N.
        """
        super().__init__()
        self.position = nn.Parameter(torch.randn(num_queries, dim))
        self.content = nn.Parameter(torch.randn(num_queries, dim))
        self.reference = nn.Linear(dim, 2)
        nn.init.xavier_uniform_(self.reference.weight)
        nn.init.zeros_(self.reference.bias)

    def forward(self, memory: Memory) -> Queries:
        """The same :class:`Queries` for every image, with 2-d references."""
        batch = len(memory.tokens)
        references = in_full_precision(self.reference, self.position).to(memory.valid_ratios.dtype).sigmoid()
        content, position, references = (
            part.expand(batch, -1, -1) for part in (self.content, self.position, references)
        )
        return Queries(content, position, references)

    def encode_position(self, references: Tensor) -> Tensor:
        """Not available: the positions of learned queries are learned.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "learned queries cannot encode boxes as positions: set Queries.position, or use a two-stage variant."
        )


class ProposalQueries(nn.Module):
    """The N proposals of the encoder with the highest objectness; every token proposes a box around its cell.

    Padding and invalid cells are never selected; the published code does not exclude them. With fewer than N valid
    tokens, the remaining references are the full image.
    """

    def __init__(self, dim: int, num_queries: int, mixed: bool = False, wide_position: bool = False) -> None:
        """
        Args:
            dim: C.
            num_queries: N.
            mixed: the content is learned and only the position comes from the proposals ("mixed query selection" of
                DINO); otherwise both do.
            wide_position: with ``mixed``, encode boxes with 2 C channels as without it, and use only the first C. The
                other half then takes part in the layer norm only.
        """
        super().__init__()
        self.dim, self.num_queries = dim, num_queries
        self.project = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.objectness = nn.Linear(dim, 1)
        self.box_head = BoxHead(dim)
        parts = 1 if mixed and not wide_position else 2
        self.box_embed = nn.Linear(2 * dim, parts * dim)
        self.box_norm = nn.LayerNorm(parts * dim)
        self.content = nn.Parameter(torch.randn(num_queries, dim)) if mixed else None
        for layer in (self.project, self.box_embed):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.objectness.bias, -math.log(99))

    def forward(self, memory: Memory) -> Queries:
        """:class:`Queries` with 4-d references, which have no gradient, and with the encoder's outputs."""
        outputs = self.propose(memory)
        references = self._best(outputs)
        embedded = self._embed(references)
        content = embedded[..., self.dim :] if self.content is None else self.content.expand(len(references), -1, -1)
        return Queries(content, embedded[..., : self.dim], references, outputs)

    def propose(self, memory: Memory) -> EncoderOutputs:
        """The :class:`EncoderOutputs` of every token."""
        centres = cell_centres(memory.spatial_shapes, memory.valid_ratios)
        sizes = [
            centres.new_full((height * width,), 0.05 * 2.0**level)
            for level, (height, width) in enumerate(memory.spatial_shapes)
        ]
        sizes = torch.cat(sizes)[None, :, None].expand(len(centres), -1, 2)
        proposals = torch.cat([centres, sizes], dim=-1)
        valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1) & ~memory.padding_mask
        tokens = self.norm(self.project(memory.tokens.masked_fill(~valid[..., None], 0.0)))
        proposals = torch.log(proposals / (1 - proposals)).masked_fill(~valid[..., None], 0.0)
        logits = self.box_head(tokens).to(proposals.dtype) + proposals
        boxes = logits.sigmoid()
        full_image = boxes.new_tensor([0.5, 0.5, 1.0, 1.0])
        objectness = in_full_precision(self.objectness, tokens)
        return EncoderOutputs(objectness, torch.where(valid[..., None], boxes, full_image), valid)

    def encode_position(self, references: Tensor) -> Tensor:
        """Positions of boxes: Tensor [B, N, 4] -> [B, N, C].

        Raises:
            UsageError: the references are points, not boxes.
        """
        return self._embed(references)[..., : self.dim]

    def _embed(self, references):
        if references.shape[-1] != 4:
            raise UsageError(f"positions are encoded from 4 box coordinates, not {references.shape[-1]}.")
        return self.box_norm(self.box_embed(box_position(references, self.dim // 2)))

    def _best(self, outputs):
        """Boxes of the N proposals with the highest objectness, best first: Tensor [B, N, 4]."""
        scores = outputs.logits[..., 0].masked_fill(~outputs.valid, -math.inf)
        count = min(self.num_queries, scores.shape[1])
        chosen = scores.topk(count, dim=1).indices
        references = outputs.boxes_cxcywh.detach().gather(1, chosen[..., None].expand(-1, -1, 4))
        if count == self.num_queries:
            return references
        full_image = references.new_tensor([0.5, 0.5, 1.0, 1.0]).expand(len(references), self.num_queries - count, -1)
        return torch.cat([references, full_image], dim=1)
