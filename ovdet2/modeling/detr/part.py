"""What a method may add to the DETR host (:class:`OpenVocabularyDeformableDETR`).

Shapes: L decoder layers, B images, N queries, G extra queries of a part, K words, X the most objects of one image.
Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid.
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
    """Inputs of a training step before decoding.

    Attributes:
        samples: samples of the batch, all with boxes.
        targets: :class:`Targets` of the samples.
        memory: :class:`Memory`, the encoded images.
        queries: :class:`Queries` of the detector, after :meth:`DetrPart.alter_queries` of every part.
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
    """Extra queries that are decoded together with the detector's queries, which do not attend to them.

    Attributes:
        queries: :class:`Queries` of G queries of each image, with positions.
        hidden: Tensor [B * H, G, N + G] bool, H heads of the decoder: True where the query of the row must not attend
            to that of the column. Columns are the detector's N queries, then the G queries of the group.
    """

    queries: Queries
    hidden: Tensor


@dataclass(frozen=True)
class Prepared:
    """What a part returns before decoding.

    Attributes:
        losses: unweighted losses that need no decoder outputs.
        extra: queries to decode together with the detector's, or None.
        state: any value; it is passed to :meth:`DetrPart.losses_before_matching`.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    extra: ExtraQueries | None = None
    state: Any = None


class DetrPart(Part):
    """A part of the DETR host. The base class does nothing; a part overrides the methods that it needs."""

    def alter_queries(self, queries: Queries, samples: Sequence[Sample]) -> Queries:
        """Alter the input queries of the decoder, in training and at test; for example, add semantic priors."""
        return queries

    def matching_costs(self) -> list[MatchingCost]:
        """Further matching costs: pairs of a weight and a function of the outputs and the padded labels [B, X] that
        returns a cost Tensor [L, B, N, X]."""
        return []

    def before_decoding(self, step: DetrStep) -> Prepared:
        """Compute losses on the encoded images, and extra queries to decode. Collective calls are allowed."""
        return Prepared()

    def alter_outputs(self, outputs: DetrOutputs) -> DetrOutputs:
        """In training, alter the outputs of all queries, including extra ones, before matching and losses."""
        return outputs

    def losses_before_matching(
        self, step: DetrStep, prepared: Prepared, extra_outputs: DetrOutputs | None
    ) -> dict[str, Tensor]:
        """Unweighted losses of the part's extra queries. Collective calls are allowed, since matching, which may raise
        in one process only, comes later."""
        return {}

    def losses(
        self, step: DetrStep, outputs: DetrOutputs, matches: Sequence[Matches], num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Unweighted losses of the detector's queries and their matched objects; no collective calls.

        Args:
            step: see :class:`DetrStep`.
            outputs: outputs of the N queries.
            matches: pairs of each layer that has losses, in the order of the layers.
            num_boxes: mean number of objects of a process, at least 1.
        """
        return {}

    def score(self, outputs: DetrOutputs, queries: Queries) -> DetrOutputs:
        """At test, alter the outputs; the scores are the sigmoid of their ``pred_logits``."""
        return outputs

    def annotate(self, instances: Instances, queries: Queries, image: int) -> None:
        """Add fields to the detections of an image (index ``image`` in the batch). ``instances.queries`` holds the
        index of the query of each detection."""

    def weak_losses(self, samples: Sequence[Sample], memory: Memory, network: DeformableDETR) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images without boxes, of the kinds in ``sees``."""
        return {}
