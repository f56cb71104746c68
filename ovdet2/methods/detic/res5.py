"""The RoI heads of Detic on OV-COCO: Detectron2's res5 head with a text classifier.

Shapes: N images, R regions, F = 2,048 features of a region. Names: ``pred_`` predicted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.structures import ImageList, Instances
from torch import Tensor

from ovdet2.data.samples import Sample
from ovdet2.errors import UsageError
from ovdet2.layers import CosineClassifier
from ovdet2.methods.detic.cascade import DeticOutputLayers, detic_classifier
from ovdet2.modeling.rcnn.part import RCNNPart
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

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        samples: Sequence[Sample] = (),
        parts: Sequence[RCNNPart] = (),
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Detections of each image, with ``pred_masks`` if there is a mask head.

        Args:
            images: not used.
            features: maps of the backbone by name.
            proposals: ``proposal_boxes`` of the RPN.
            targets, samples, parts: not used.

        Returns:
            (detections, {}).

        Raises:
            UsageError: in training.
            NumericalError: a score or box is not finite.
        """
        if self.training:
            raise UsageError("Detic's networks have no losses here: they take published weights for detection only.")
        levels = {name: level.float() for name, level in features.items()}
        boxes = [of_image.proposal_boxes for of_image in proposals]
        pooled = self._shared_roi_transform([levels[name] for name in self.in_features], boxes)
        detections, _ = self._predictor.inference(self._predictor(pooled.mean(dim=(2, 3))), proposals)
        return self.forward_with_given_boxes(levels, detections), {}
