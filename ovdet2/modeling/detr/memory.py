"""What passes between the steps of the transformer.

Shapes: B images, S tokens of L levels, N queries, C channels.
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
        tokens: Tensor [B, S, C], level after level, each row by row. Padded ones mean nothing.
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
    """What the first stage gives for every token.

    Attributes:
        logits: Tensor [B, S, 1], objectness.
        boxes_cxcywh: Tensor [B, S, 4] in (0, 1) of the image without its padding.
        valid: bool Tensor [B, S]: False for padding and for cells too near the border or too large to propose; their
            boxes are the whole image and their logits mean nothing.
    """

    logits: Tensor
    boxes_cxcywh: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Queries:
    """What the decoder starts from; ``dataclasses.replace`` makes altered ones, which keep the attachments.

    Attributes:
        content: Tensor [B, N, C].
        position: Tensor [B, N, C] added to the content in every layer, or None: encoded from 4-d references.
        references: Tensor [B, N, 2] of centres or [B, N, 4] of (cx, cy, w, h), in (0, 1) of the image without its
            padding.
        encoder_outputs: :class:`EncoderOutputs`, or None with one stage.
        attachments: what parts know of the queries, by its class.
    """

    content: Tensor
    position: Tensor | None
    references: Tensor
    encoder_outputs: EncoderOutputs | None = None
    attachments: Mapping[type, Any] = field(default_factory=dict)

    def attach(self, value: object) -> Queries:
        """The same queries with what a part knows of them; one value of a class."""
        return replace(self, attachments={**self.attachments, type(value): value})

    def attached(self, kind: type[Attachment]) -> Attachment | None:
        """What :meth:`attach` was given of a class; None if nothing."""
        return self.attachments.get(kind)
