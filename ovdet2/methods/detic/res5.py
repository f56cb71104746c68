"""The RoI heads of Detic on OV-COCO: Detectron2's res5 head with a text classifier.

Shapes: N images, R regions, F = 2,048 features of a region, S pooled side, D embedding dimension.
Names: ``pred_`` predicted, ``gt_`` ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor

from ovdet2.data.samples import Sample
from ovdet2.errors import UsageError
from ovdet2.layers import CosineClassifier
from ovdet2.methods.detic.cascade import DeticOutputLayers, detic_classifier
from ovdet2.modeling.part import joined, weighted
from ovdet2.modeling.rcnn.part import RCNNPart, RegionBatch
from ovdet2.modeling.rcnn.roi_heads import OpenVocabularyROIHeads
from ovdet2.vocabulary.bank import WordBank


@ROI_HEADS_REGISTRY.register()
class DeticRes5ROIHeads(Res5ROIHeads):
    """Regions of one map go through the last stage of the ResNet; their mean is classified by words.

    The score of a word is its probability: the objectness of the proposal does not count.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """
        Args:
            kwargs: as of :class:`Res5ROIHeads`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], vocabulary: WordBank
    ) -> dict[str, Any]:
        """Arguments from a configuration, with the word bank of the detector."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        # Detectron2's predictor was built for the same features.
        width = arguments["box_predictor"].cls_score.in_features
        classifier = detic_classifier(cfg, width, vocabulary)
        predictor = DeticOutputLayers(cfg, ShapeSpec(channels=width, height=1, width=1), classifier)
        return arguments | {"box_predictor": predictor, "num_classes": classifier.num_training_classes}

    @property
    def classifier(self) -> CosineClassifier:
        """The classifier: [R, F] -> logits, background last."""
        # Detectron2 annotates the predictor as nn.Module.
        return cast(CosineClassifier, self._predictor.cls_score)

    @property
    def _predictor(self) -> DeticOutputLayers:
        return cast(DeticOutputLayers, self.box_predictor)

    @property
    def text_classifier(self) -> CosineClassifier:
        """:attr:`classifier`, whose ``embed`` gives region embeddings [R, D]."""
        return self.classifier

    @property
    def feature_dim(self) -> int:
        """F."""
        return self.classifier.projection.in_features

    def pool(self, features: Mapping[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Features of the last stage of the ResNet at given boxes.

        Args:
            features: maps of the backbone by name.
            boxes: boxes of each of the N images, in pixels of the network's input, on any device.

        Returns:
            Tensor [R, F, S, S] float32, of the boxes of all images in order.
        """
        levels = [features[name].float() for name in self.in_features]
        return self._shared_roi_transform(levels, [of_image.to(levels[0].device) for of_image in boxes])

    def embed_boxes(self, features: Mapping[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Region embeddings of given boxes: Tensor [R, D] float32, unit rows; arguments as of :meth:`pool`."""
        return self.classifier.embed(self.pool(features, boxes).mean(dim=(2, 3)))

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        samples: Sequence[Sample] = (),
        parts: Sequence[RCNNPart] = (),
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Losses in training, detections at test, with ``pred_masks`` if there is a mask head.

        Args:
            images: not used.
            features: maps of the backbone by name.
            proposals: ``proposal_boxes`` of the RPN.
            targets: in training, :class:`Instances` of the N images with ``gt_boxes`` and ``gt_classes``.
            samples: samples of the N images, for the parts.
            parts: parts of the detector.

        Returns:
            (sampled proposals, weighted losses, those of the parts last) in training, (detections, {}) at test.

        Raises:
            UsageError: in training, with masks, or with a part that pools own boxes.
            NumericalError: at test, a score or box is not finite.
        """
        features = {name: level.float() for name, level in features.items()}
        if self.training:
            assert targets is not None, "a training step needs targets"
            sampled = self.label_and_sample_proposals(proposals, targets)
            return sampled, self._losses(features, sampled, samples, parts)
        pooled = self.pool(features, [of_image.proposal_boxes for of_image in proposals])
        detections, _ = self._predictor.inference(self._predictor(pooled.mean(dim=(2, 3))), proposals)
        return self.forward_with_given_boxes(features, detections), {}

    def _losses(
        self,
        features: Mapping[str, Tensor],
        sampled: list[Instances],
        samples: Sequence[Sample],
        parts: Sequence[RCNNPart],
    ) -> dict[str, Tensor]:
        pooled = self.pool(features, [of_image.proposal_boxes for of_image in sampled])
        box_features = pooled.mean(dim=(2, 3))
        losses = self._predictor.losses(self._predictor(box_features), sampled)
        # The RoI heads of ovdet2 have a box head of another form; a part sees the same members.
        heads = cast(OpenVocabularyROIHeads, self)
        batch = RegionBatch(samples, features, sampled, pooled, box_features, heads)
        if self.mask_on:
            raise UsageError("DeticRes5ROIHeads trains no masks: set MODEL.MASK_ON to False.")
        for part in parts:
            if part.own_boxes(samples) is not None:
                raise UsageError(
                    f"DeticRes5ROIHeads does not pool the boxes of {part.name}: use MODEL.ROI_HEADS.NAME "
                    '"OpenVocabularyROIHeads" for that method.'
                )
            losses = joined(losses, weighted(part.losses(batch), part))
        return losses
