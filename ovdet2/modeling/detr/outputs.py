"""Outputs of the decoder, per layer and query.

Shapes: L decoder layers, B images, N queries, C channels, K words, H heads, M levels of attention, P points.
Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid,
``_cxcywh`` boxes (centre x, centre y, width, height).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ovdet2.modeling.detr.memory import EncoderOutputs


@dataclass(frozen=True)
class Decoded:
    """Hidden states and boxes of all queries, before classification.

    Attributes:
        hidden: Tensor [L, B, N, C].
        boxes_cxcywh: Tensor [L, B, N, 4] in (0, 1) of the image without its padding.
        references: L Tensor [B, N, 2 or 4], the reference points or boxes of each layer, in the same frame.
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
    """Logits and boxes of every query. ``dataclasses.replace`` makes altered copies.

    Attributes:
        pred_logits: Tensor [L or 1, B, N, K], of every layer or only of the last one.
        pred_boxes: Tensor [L, B, N, 4], cxcywh in (0, 1) of the image without its padding.
        hidden: Tensor [L, B, N, C], the hidden states from which the two are predicted.
        references, sampling_locations, sampling_weights: see :class:`Decoded`.
        encoder: :class:`EncoderOutputs` of a two-stage detector, per token and not per query; None with one
            stage.
        added: outputs of parts by name, each Tensor [L or 1, B, N, ...]; indexed together with the queries.
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
        """Number of layers that have logits."""
        return len(self.pred_logits)

    def take(self, queries: slice) -> DetrOutputs:
        """The outputs of a slice of the queries; ``encoder`` is unchanged."""
        return self._cut((slice(None), slice(None), queries), tuple(part[:, queries] for part in self.references))

    def last_layer(self) -> DetrOutputs:
        """The outputs of the last layer, each with L = 1."""
        return self._cut((slice(-1, None),), self.references[-1:])

    def with_added(self, **values: Tensor) -> DetrOutputs:
        """A copy with further entries in ``added``."""
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
