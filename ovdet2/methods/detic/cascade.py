"""The RoI heads of Detic: Detectron2's class-agnostic cascade with a text classifier in each stage.

Shapes: N images, R regions, F features of a box head, K words, D embedding dimension.
Names: ``pred_`` predicted, ``_probs`` probabilities in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import CascadeROIHeads
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ovdet2.data.samples import Sample
from ovdet2.errors import UsageError
from ovdet2.layers import CosineClassifier
from ovdet2.modeling.rcnn.output_layers import OpenVocabularyOutputLayers, require_finite
from ovdet2.modeling.rcnn.part import RCNNPart
from ovdet2.vocabulary.bank import WordBank


class DeticOutputLayers(OpenVocabularyOutputLayers):
    """A box predictor whose box regression has a hidden layer."""

    @configurable
    def __init__(self, input_shape: ShapeSpec, **kwargs: Any) -> None:
        """
        Args:
            input_shape: F as ``channels``.
            kwargs: as of :class:`OpenVocabularyOutputLayers`.
        """
        super().__init__(input_shape, **kwargs)
        width = cast(int, input_shape.channels)
        last = nn.Linear(width, 4)
        nn.init.normal_(last.weight, std=0.001)  # as Detectron2's layer: proposals hardly move at first
        nn.init.zeros_(last.bias)
        # Detectron2 annotates it as nn.Linear, but only calls it.
        self.bbox_pred = nn.Sequential(  # pyrefly: ignore[bad-assignment]
            nn.Linear(width, width), nn.ReLU(inplace=True), last
        )


def detic_classifier(cfg: CfgNode, input_dim: int, bank: WordBank, owns_bank: bool = True) -> CosineClassifier:
    """``cos(e, t) / tau`` with a sigmoid for each word and no bias; arguments as of :class:`CosineClassifier`."""
    tau = cfg.MODEL.OVD.TEMPERATURE
    return CosineClassifier(input_dim, bank, temperature=tau, background="zero", owns_bank=owns_bank)


@ROI_HEADS_REGISTRY.register()
class DeticCascadeROIHeads(CascadeROIHeads):
    """A cascade whose stages refine the boxes of the previous one, and class-agnostic masks.

    The score of a word is ``sqrt(o * mean_s p_s)``: p_s is the probability of stage s at its boxes, o the objectness of
    the proposal.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """
        Args:
            kwargs: as of :class:`CascadeROIHeads`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], vocabulary: WordBank
    ) -> dict[str, Any]:
        """Arguments from a configuration, with the word bank of the detector."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        predictors = []
        for stage, (head, weights) in enumerate(
            zip(arguments["box_heads"], cfg.MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS)
        ):
            # The first stage holds the bank in checkpoints.
            classifier = detic_classifier(cfg, head.output_shape.channels, vocabulary, owns_bank=stage == 0)
            transform = Box2BoxTransform(weights=weights)
            predictors.append(DeticOutputLayers(cfg, head.output_shape, classifier, box2box_transform=transform))
        return arguments | {
            "box_predictors": predictors,
            "num_classes": predictors[0].cls_score.num_training_classes,
        }

    @property
    def classifier(self) -> CosineClassifier:
        """The classifier of the last stage, whose boxes are the detections; it shares the word bank of all stages."""
        return self._predictors[-1].cls_score  # pyrefly: ignore[bad-return]  built here with that classifier

    @property
    def _predictors(self) -> Sequence[DeticOutputLayers]:
        # Detectron2 annotates the ModuleList as nn.Module.
        return cast(Sequence[DeticOutputLayers], self.box_predictor)

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
            proposals: ``proposal_boxes`` and ``scores``, the objectness.
            targets, samples, parts: not used.

        Returns:
            (detections, {}).

        Raises:
            UsageError: in training.
            NumericalError: a score or box is not finite.
        """
        if self.training:
            raise UsageError("the cascade of Detic has no losses here: it takes published weights for detection only.")
        features = {name: level.float() for name, level in features.items()}
        detections = self._forward_box(features, proposals)
        return self.forward_with_given_boxes(features, detections), {}

    def _forward_box(self, features, proposals, targets=None):
        levels = [features[name] for name in self.box_in_features]
        objectness = [of_image.scores for of_image in proposals]
        sizes = [of_image.image_size for of_image in proposals]
        probs_of_stages, boxes = [], []
        for stage, predictor in enumerate(self._predictors):
            if stage > 0:
                proposals = self._create_proposals_from_boxes(boxes, sizes)
            predictions = self._run_stage(levels, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            require_finite(*boxes)
            probs_of_stages.append(predictor.predict_probs(predictions, proposals))
        means = [torch.stack(of_image).mean(dim=0) for of_image in zip(*probs_of_stages)]
        scores = [(probs * of_image[:, None]).sqrt() for probs, of_image in zip(means, objectness)]
        return self._predictors[-1].select(boxes, scores, sizes)[0]
