"""What the decoder gives for its queries, layer by layer.

Shapes: L decoder layers, B images, N queries, C channels, K words, H heads, M levels of attention, P points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ovdet2.modeling.detr.memory import EncoderOutputs


@dataclass(frozen=True)
class Decoded:
    """States and boxes of all queries, before any of them is classified.

    Attributes:
        hidden: Tensor [L, B, N, C].
        boxes_cxcywh: Tensor [L, B, N, 4] in (0, 1) of the image without its padding.
        references: L Tensor [B, N, 2 or 4], what each layer started from, in the same frame.
        sampling_locations: Tensor [L, B, N, H, M, P, 2], (x, y) in [0, 1] of the padded map of each level; None unless
            requested.
        sampling_weights: Tensor [L, B, N, H, M, P]; None unless requested.
    """

    hidden: Tensor
    boxes_cxcywh: Tensor
    references: tuple[Tensor, ...]
    sampling_locations: Tensor | None = None
    sampling_weights: Tensor | None = None


@dataclass(frozen=True)
class DetrOutputs:
    """Logits and boxes of every query; ``dataclasses.replace`` makes altered ones.

    Attributes:
        pred_logits: Tensor [L or 1, B, N, K], of every layer or of the last one alone.
        pred_boxes: Tensor [L, B, N, 4], cxcywh in (0, 1) of the image without its padding.
        hidden: Tensor [L, B, N, C], the states that they were read from.
        references, sampling_locations, sampling_weights: of :class:`Decoded`.
        encoder: :class:`EncoderOutputs` of a two-stage detector, which are of tokens and not of queries; None with one
            stage.
        added: what parts have added by name, each Tensor [L or 1, B, N, ...]; cut along with the queries.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    hidden: Tensor
    references: tuple[Tensor, ...] = ()
    sampling_locations: Tensor | None = None
    sampling_weights: Tensor | None = None
    encoder: EncoderOutputs | None = None
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Layers that have logits."""
        return len(self.pred_logits)

    def take(self, queries: slice) -> DetrOutputs:
        """The outputs of some of the queries; ``encoder`` stays."""
        return self._cut((slice(None), slice(None), queries), tuple(part[:, queries] for part in self.references))

    def last_layer(self) -> DetrOutputs:
        """The outputs of the last layer, each with L = 1."""
        return self._cut((slice(-1, None),), self.references[-1:])

    def with_added(self, **values: Tensor) -> DetrOutputs:
        """Also these in ``added``."""
        return replace(self, added={**self.added, **values})

    def _cut(self, place: tuple[slice, ...], references: tuple[Tensor, ...]) -> DetrOutputs:
        locations, weights = self.sampling_locations, self.sampling_weights
        return replace(
            self,
            pred_logits=self.pred_logits[place],
            pred_boxes=self.pred_boxes[place],
            hidden=self.hidden[place],
            references=references,
            sampling_locations=None if locations is None else locations[place],
            sampling_weights=None if weights is None else weights[place],
            added={name: value[place] for name, value in self.added.items()},
        )
