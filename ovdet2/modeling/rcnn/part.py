"""What a method may add to the R-CNN hosts (:class:`OpenVocabularyRCNN`, :class:`FrozenVLMRCNN`).

Shapes: N images, R regions of a batch, C channels, S pooled side, F features of the box head, K words, D embedding
dimension.
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
    """The regions of a batch of images, pooled, with what a part may need to read them.

    Attributes:
        samples: of the batch, N images.
        features: maps of the backbone by name, float32.
        proposals: for each image :class:`Instances` with ``proposal_boxes`` in pixels of the network's input; in
            training the sampled ones with ``gt_classes``.
        pooled: Tensor [R, C, S, S], of the proposals of all images in order.
        box_features: Tensor [R, F], the box head's features of them.
        heads: to pool, embed and classify: ``heads.pool(features, boxes)``, ``heads.embed_boxes(features, boxes)``,
            ``heads.classifier``, ``heads.text_classifier.embed(box_features)``.
        own_pooled: Tensor [R', C, S, S], of the boxes that the part itself gave; None without, and at test.
        own_features: Tensor [R', F], the box head's features of them; None unless the part shares the head.
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
        """Number of proposals of each image: what splits R rows into images."""
        return [len(proposals) for proposals in self.proposals]


@dataclass(frozen=True)
class WeakBatch:
    """Images without boxes, with proposals of the RPN that carry no gradient.

    They pass through the backbone in training mode: batch statistics, where the backbone has any, are theirs, too.

    Attributes:
        samples: N images of one or several of the kinds that the part ``sees``; ``captions`` or ``labels`` of each.
        features: maps [N, ...] of the backbone by name, with gradient.
        proposals: for each image :class:`Instances` with ``proposal_boxes`` in pixels of the network's input and
            ``objectness_logits``, best first, possibly empty. As many as at test.
        heads: ``heads.embed_boxes(features, boxes)`` gives unit embeddings [R, D] of boxes.
    """

    samples: Sequence[Sample]
    features: Mapping[str, Tensor]
    proposals: Sequence[Instances]
    heads: OpenVocabularyROIHeads

    def only(self, kinds: Sequence[str]) -> WeakBatch | None:
        """The images of some kinds, in their order; None without any."""
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
    """The base adds nothing; a part overrides what it has.

    Attributes:
        shares_head: whether the boxes of :meth:`own_boxes` go through the detector's box head, in one pass with the
            sampled proposals: where the head has batch statistics, both then share them, as they will at test.
        reads_frozen_trunk: whether the scores are read from a map of the trunk that training must not have changed.
    """

    shares_head: bool = True
    reads_frozen_trunk: bool = False

    def own_boxes(self, samples: Sequence[Sample]) -> list[Boxes] | None:
        """Boxes beside the proposals that a training step pools for this part; one entry an image, possibly empty, on
        any device, in pixels of the image. None: no boxes."""
        return None

    def losses(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images with boxes. The names are the same in every step, and with
        several processes every trained weight of the part needs a gradient, even where an image has no box."""
        return {}

    def weak_losses(self, batch: WeakBatch) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images without boxes, of the kinds that the part ``sees``, by other
        names than those of :meth:`losses`."""
        return {}

    def secondary_probs(self, batch: RegionBatch) -> list[Tensor] | None:
        """At test, probabilities [R_i, K] or [R_i, K + 1] (background last) of the proposals of each image, which the
        box predictor uses as MODEL.OVD.SECONDARY_USE says; None: this part gives none."""
        return None
