"""What a method may add to the R-CNN hosts (:class:`OpenVocabularyRCNN`, :class:`FrozenVLMRCNN`).

Shapes: N images, R regions of a batch, C channels, S pooled side, F features of the box head, K words, D embedding
dimension. Names: ``gt_`` ground truth, ``_logits`` before softmax or sigmoid, ``_probs`` probabilities in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from detectron2.structures import Boxes, Instances
from torch import Tensor

from ovdet2.data.samples import Sample
from ovdet2.modeling.part import Part

if TYPE_CHECKING:
    from ovdet2.modeling.rcnn.roi_heads import OpenVocabularyROIHeads


@dataclass(frozen=True)
class RegionBatch:
    """The pooled regions of a batch of images, and what a part may need to process them.

    Attributes:
        samples: samples of the N images.
        features: maps of the backbone by name, float32.
        proposals: for each image, :class:`Instances` with ``proposal_boxes`` in pixels of the network's input; in
            training, the sampled proposals with ``gt_classes``.
        pooled: Tensor [R, C, S, S], RoI features of the proposals of all images, in order.
        box_features: Tensor [R, F], the box head's features of the proposals.
        heads: RoI heads, to pool, embed and classify: ``heads.pool(features, boxes)``, ``heads.embed_boxes(features,
            boxes)``, ``heads.classifier``, ``heads.text_classifier.embed(box_features)``.
        own_pooled: Tensor [R', C, S, S], RoI features of :meth:`RCNNPart.own_boxes`; None without them and at test.
        own_features: Tensor [R', F], the box head's features of these boxes; None unless ``shares_head``.
    """

    samples: Sequence[Sample]
    features: Mapping[str, Tensor]
    proposals: Sequence[Instances]
    pooled: Tensor
    box_features: Tensor
    heads: OpenVocabularyROIHeads
    own_pooled: Tensor | None = None
    own_features: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Number of proposals of each image, to split R rows by image."""
        return [len(proposals) for proposals in self.proposals]


@dataclass(frozen=True)
class WeakBatch:
    """Images without boxes, with RPN proposals without gradient.

    They pass through the backbone in training mode: if the backbone has batch statistics, these images contribute.

    Attributes:
        samples: samples of N images of the kinds in ``sees``, with ``captions`` or ``labels``.
        features: maps [N, ...] of the backbone by name, with gradient.
        proposals: for each image, :class:`Instances` with ``proposal_boxes`` in pixels of the network's input and
            ``objectness_logits``, best first, possibly empty; the number is as at test.
        heads: RoI heads; ``heads.embed_boxes(features, boxes)`` returns unit embeddings [R, D] of boxes.
    """

    samples: Sequence[Sample]
    features: Mapping[str, Tensor]
    proposals: Sequence[Instances]
    heads: OpenVocabularyROIHeads

    def only(self, kinds: Sequence[str]) -> WeakBatch | None:
        """The images of the given kinds, in their order; None if there are none."""
        places = [place for place, sample in enumerate(self.samples) if sample.kind in kinds]
        if len(places) == len(self.samples):
            return self
        if not places:
            return None
        return WeakBatch(
            [self.samples[place] for place in places],
            {name: level[places] for name, level in self.features.items()},
            [self.proposals[place] for place in places],
            self.heads,
        )


class RCNNPart(Part):
    """A part of the R-CNN hosts. The base class does nothing; a part overrides the methods that it needs.

    Attributes:
        shares_head: whether the boxes of :meth:`own_boxes` go through the detector's box head, in one pass with the
            sampled proposals. If the head has batch normalisation, both then share its statistics, as at test.
        reads_frozen_trunk: whether the secondary scores are computed from a trunk map and so require a frozen trunk.
    """

    shares_head: bool = True
    reads_frozen_trunk: bool = False

    def own_boxes(self, samples: Sequence[Sample]) -> list[Boxes] | None:
        """Further boxes to pool for this part in a training step: one entry per image, possibly empty, on any device,
        in pixels of the network's input. None: no boxes."""
        return None

    def losses(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images with boxes. The names are the same in every step, and with
        several processes every trained weight of the part needs a gradient, even where an image has no box."""
        return {}

    def weak_losses(self, batch: WeakBatch) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images without boxes, of the kinds in ``sees``, under other
        names than those of :meth:`losses`."""
        return {}

    def secondary_probs(self, batch: RegionBatch) -> list[Tensor] | None:
        """At test, secondary scores of the proposals of each image: probabilities [R_i, K] or [R_i, K + 1] (background
        last). MODEL.OVD.SECONDARY_USE sets how the box predictor uses them. None: this part computes none."""
        return None
