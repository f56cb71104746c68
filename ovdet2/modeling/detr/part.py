"""What a method may add to the DETR host (:class:`OpenVocabularyDeformableDETR`).

Shapes: L decoder layers, B images, N queries, G extra queries of a part, K words, X the most objects of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from detectron2.structures import Instances
from torch import Tensor

from ovdet2.data.samples import Sample
from ovdet2.modeling.part import Part

if TYPE_CHECKING:
    from ovdet2.modeling.detr.criterion import SetCriterion
    from ovdet2.modeling.detr.matcher import MatchingCost
    from ovdet2.modeling.detr.memory import Memory, Queries
    from ovdet2.modeling.detr.model import DeformableDETR
    from ovdet2.modeling.detr.outputs import DetrOutputs
    from ovdet2.modeling.detr.targets import Matches, Targets


@dataclass(frozen=True)
class DetrStep:
    """A training step before it is decoded.

    Attributes:
        samples: of the batch, all with boxes.
        targets: :class:`Targets` of them.
        memory: :class:`Memory`, the encoded images.
        queries: :class:`Queries` that the detector itself decodes, after every part has altered them.
        network: :class:`DeformableDETR`.
        criterion: :class:`SetCriterion`, whose losses a part may use for its own queries.
    """

    samples: Sequence[Sample]
    targets: Targets
    memory: Memory
    queries: Queries
    network: DeformableDETR
    criterion: SetCriterion


@dataclass(frozen=True)
class ExtraQueries:
    """Queries that are decoded with the detector's own, which never see them.

    Attributes:
        queries: :class:`Queries` of G queries of each image, with positions.
        hidden: Tensor [B * H, G, N + G] bool, H heads of the decoder: True where the row's query must not see the
            column's, of the detector's N queries and then of its own group.
    """

    queries: Queries
    hidden: Tensor


@dataclass(frozen=True)
class Prepared:
    """What a part has done before decoding.

    Attributes:
        losses: unweighted losses that need no decoding.
        extra: queries to decode with the detector's, or None.
        state: whatever :meth:`DetrPart.losses_before_matching` wants back.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    extra: ExtraQueries | None = None
    state: Any = None


class DetrPart(Part):
    """The base adds nothing; a part overrides what it has."""

    def alter_queries(self, queries: Queries, samples: Sequence[Sample]) -> Queries:
        """The queries that the decoder starts from, in training and at test, such as with semantic priors added."""
        return queries

    def matching_costs(self) -> list[MatchingCost]:
        """Further costs of matching: pairs of a weight and a function of the outputs and the padded labels [B, X] that
        gives a cost Tensor [L, B, N, X]."""
        return []

    def before_decoding(self, step: DetrStep) -> Prepared:
        """Losses on the encoded images, and further queries to decode. Collective calls are allowed."""
        return Prepared()

    def alter_outputs(self, outputs: DetrOutputs) -> DetrOutputs:
        """In training, what matching and losses are to see of all decoded queries, those of parts included."""
        return outputs

    def losses_before_matching(
        self, step: DetrStep, prepared: Prepared, extra_outputs: DetrOutputs | None
    ) -> dict[str, Tensor]:
        """Unweighted losses of the part's extra queries. Collective calls are allowed: no process can have stopped at a
        cost that is not finite."""
        return {}

    def losses(
        self, step: DetrStep, outputs: DetrOutputs, matches: Sequence[Matches], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted losses of the detector's queries and the objects they are matched with; no collective calls.

        Args:
            step: see :class:`DetrStep`.
            outputs: of the N queries.
            matches: of each layer that has losses, the last layer's last.
            num_boxes: mean number of objects of a process, at least 1.
        """
        return {}

    def score(self, outputs: DetrOutputs, queries: Queries) -> DetrOutputs:
        """At test, the outputs whose ``pred_logits`` become scores by a sigmoid."""
        return outputs

    def annotate(self, instances: Instances, queries: Queries, image: int) -> None:
        """Add fields to the detections of an image (number ``image`` of the batch); ``instances.queries`` says which
        query each was read from."""

    def weak_losses(self, samples: Sequence[Sample], memory: Memory, network: DeformableDETR) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images without boxes, of the kinds that the part ``sees``."""
        return {}
