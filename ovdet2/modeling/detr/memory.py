"""What passes between the steps of the transformer.

Shapes: B images, S tokens of L levels, N queries, C channels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Memory:
    """The encoded image.

    Attributes:
        tokens: Tensor [B, S, C], level after level, each row by row. Padded ones mean nothing.
        spatial_shapes: L (height, width).
        padding_mask: bool Tensor [B, S], True where padded.
        valid_ratios: Tensor [B, L, 2], (x, y): the part of each map that is not padding, in (0, 1].
    """

    tokens: torch.Tensor
    spatial_shapes: tuple
    padding_mask: torch.Tensor
    valid_ratios: torch.Tensor

    def levels(self):
        """The tokens as maps: list of Tensor [B, C, h, w], one per level."""
        sizes = [height * width for height, width in self.spatial_shapes]
        return [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(self.tokens.split(sizes, dim=1), self.spatial_shapes)
        ]


class EncoderOutputs(NamedTuple):
    """What the first stage says of every token.

    Attributes:
        logits: Tensor [B, S, 1], objectness.
        boxes_cxcywh: Tensor [B, S, 4] in (0, 1) of the image without its padding.
        valid: bool Tensor [B, S]: False for padding and for cells too near the border or too large to propose; their
            boxes are the whole image and their logits mean nothing.
    """

    logits: torch.Tensor
    boxes_cxcywh: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class Queries:
    """What the decoder starts from; ``dataclasses.replace`` makes altered ones.

    Attributes:
        content: Tensor [B, N, C].
        position: Tensor [B, N, C] added to the content in every layer, or None: encoded from 4-d references.
        references: Tensor [B, N, 2] of centres or [B, N, 4] of (cx, cy, w, h), in (0, 1) of the image without its
            padding.
        encoder_outputs: :class:`EncoderOutputs`, or None with one stage.
        words: Tensor [B, N] int64, the vocabulary's word that each query carries as a prior, -1 for none; or None.
    """

    content: torch.Tensor
    position: torch.Tensor | None
    references: torch.Tensor
    encoder_outputs: EncoderOutputs | None = None
    words: torch.Tensor | None = None
