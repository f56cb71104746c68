"""Data passed between encoder, query selection and decoder.

Shapes: B images, S tokens of L levels, N queries, C channels.
Names: ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

Attachment = TypeVar("Attachment")


@dataclass(frozen=True)
class Memory:
    """The encoded images.

    Attributes:
        tokens: Tensor [B, S, C], level after level, each in row-major order. Values of padded tokens are meaningless.
        spatial_shapes: L (height, width).
        padding_mask: bool Tensor [B, S], True where padded.
        valid_ratios: Tensor [B, L, 2], (x, y): the part of each map that is not padding, in (0, 1].
    """

    tokens: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    padding_mask: Tensor
    valid_ratios: Tensor

    def levels(self) -> list[Tensor]:
        """The tokens as maps: L Tensor [B, C, h, w]."""
        sizes = [height * width for height, width in self.spatial_shapes]
        return [
            tokens.transpose(1, 2).unflatten(2, shape)
            for tokens, shape in zip(self.tokens.split(sizes, dim=1), self.spatial_shapes)
        ]

    def take(self, images: Sequence[int]) -> Memory:
        """The memory of some of the images, by their positions in the batch."""
        rows = list(images)
        return replace(
            self,
            tokens=self.tokens[rows],
            padding_mask=self.padding_mask[rows],
            valid_ratios=self.valid_ratios[rows],
        )


class EncoderOutputs(NamedTuple):
    """Outputs of the first stage: a proposal per encoder token.

    Attributes:
        logits: Tensor [B, S, 1], objectness.
        boxes_cxcywh: Tensor [B, S, 4] in (0, 1) of the image without its padding.
        valid: bool Tensor [B, S]: False for padding and for cells whose initial box is too near the border or too
            large; their boxes are the full image and their logits are meaningless.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Queries:
    """Input queries of the decoder. ``dataclasses.replace`` makes altered copies, which keep the attachments.

    Attributes:
        content: Tensor [B, N, C].
        position: Tensor [B, N, C] added to the content in every layer, or None: it is encoded from 4-d references.
        references: Tensor [B, N, 2] of centres or [B, N, 4] of (cx, cy, w, h), in (0, 1) of the image without its
            padding.
        encoder_outputs: :class:`EncoderOutputs`, or None with one stage.
        attachments: data of parts about the queries, by the class of the data.
    """

    content: Tensor
    position: Tensor | None
    references: Tensor
    encoder_outputs: EncoderOutputs | None = None
    attachments: Mapping[type, Any] = field(default_factory=dict)

    def attach(self, value: object) -> Queries:
        """A copy of the queries with data of a part attached; one value per class."""
        return replace(self, attachments={**self.attachments, type(value): value})

    def attached(self, kind: type[Attachment]) -> Attachment | None:
        """The attached value of a class; None without one. See :meth:`attach`."""
        return self.attachments.get(kind)
