"""What a method may add to the R-CNN hosts (:class:`OpenVocabularyRCNN`, :class:`FrozenVLMRCNN`).

Shapes: R regions of a batch, C channels, S pooled side, F features of the box head, K words, D embedding dimension.
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
        samples: of the batch.
        features: maps of the backbone by name, as it gives them.
        proposals: for each image :class:`Instances` with ``proposal_boxes`` in pixels of the network's input; in
            training the sampled ones with ``gt_classes``.
        pooled: Tensor [R, C, S, S], of the proposals of all images in order.
        box_features: Tensor [R, F], the box head's features of them.
        heads: to pool, embed and classify: ``heads.pool(features, boxes)``, ``heads.box_head``, ``heads.classifier``.
        own_pooled: Tensor [R', C, S, S], of the boxes that the part itself asked for; None without.
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


@dataclass(frozen=True)
class WeakBatch:
    """Images without boxes, with proposals of the RPN that carry no gradient.

    Attributes:
        samples: of one or several of the kinds that the part ``sees``; ``captions`` or ``labels`` of each.
        features: maps of the backbone by name.
        proposals: for each image :class:`Instances` with ``proposal_boxes`` in pixels of the network's input and
            ``objectness_logits``, best first.
        heads: ``heads.embed_boxes(features, boxes)`` gives unit embeddings [R, D] of boxes.
    """

    samples: Sequence[Sample]
    features: Mapping[str, Tensor]
    proposals: Sequence[Instances]
    heads: OpenVocabularyROIHeads


class RCNNPart(Part):
    """The base adds nothing; a part overrides what it has.

    Attributes:
        shares_head: whether the boxes of :meth:`own_boxes` go through the detector's box head, in one pass with the
            sampled proposals: where the head has batch statistics, both then share them, as they will at test.
    """

    shares_head: bool = True

    def own_boxes(self, samples: Sequence[Sample]) -> list[Boxes] | None:
        """Boxes beside the proposals that a training step pools for this part; one entry an image, possibly empty, on
        the device of the part, in pixels of the image. None: no boxes."""
        return None

    def losses(self, batch: RegionBatch) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images with boxes."""
        return {}

    def weak_losses(self, batch: WeakBatch) -> dict[str, Tensor]:
        """Unweighted losses of a training step on images without boxes, of the kinds that the part ``sees``."""
        return {}

    def secondary_probs(self, batch: RegionBatch) -> list[Tensor] | None:
        """At test, probabilities [R_i, K] or [R_i, K + 1] (background last) of the proposals of each image, which the
        box predictor uses as MODEL.OVD.SECONDARY_USE says; None: this part gives none."""
        return None
