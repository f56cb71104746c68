"""Detectron2's StandardROIHeads with the open-vocabulary box predictor and the parts of methods.

Shapes: N images, R regions, C channels, S pooled side, F features of the box head, K words, D embedding dimension.
Names: ``pred_`` predicted, ``_probs`` probabilities in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads, build_box_head
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ovdet2.config import methods_of
from ovdet2.data.samples import Sample
from ovdet2.errors import NumericalError, UsageError
from ovdet2.layers import ClosedSetClassifier, CosineClassifier
from ovdet2.modeling.build import build_classifier
from ovdet2.modeling.part import joined, weighted
from ovdet2.modeling.rcnn.output_layers import Classifier, OpenVocabularyOutputLayers
from ovdet2.modeling.rcnn.part import RCNNPart, RegionBatch
from ovdet2.vocabulary.bank import WordBank


@ROI_HEADS_REGISTRY.register()
class OpenVocabularyROIHeads(StandardROIHeads):
    """Box head, class-agnostic regression, masks, and a classifier over a given vocabulary.

    The number of classes, which is also the background label, is read from the classifier. The boxes of parts
    are not used in sampling, classification and box regression.
    """

    box_pooler: ROIPooler
    box_head: nn.Module
    # Detectron2 annotates it as nn.Module.
    box_predictor: OpenVocabularyOutputLayers  # pyrefly: ignore[bad-override-mutable-attribute]

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: as of :class:`StandardROIHeads`.
        """
        super().__init__(**kwargs)

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], vocabulary: WordBank
    ) -> dict[str, Any]:
        """Arguments from a configuration.

        Raises:
            UsageError: settings of the heads contradict each other.
        """
        _require_consistent(cfg)
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        head_shape = arguments["box_head"].output_shape
        classifier = build_classifier(cfg, _width(head_shape), vocabulary)
        arguments["num_classes"] = classifier.num_training_classes
        arguments["box_predictor"] = OpenVocabularyOutputLayers(cfg, head_shape, classifier)
        return arguments

    @property
    def classifier(self) -> Classifier:
        """The classifier: [R, F] -> logits, background last."""
        return self.box_predictor.cls_score

    @property
    def text_classifier(self) -> CosineClassifier:
        """:attr:`classifier`, whose ``embed`` gives region embeddings [R, D].

        Raises:
            UsageError: it is a closed-set layer, which has no embeddings.
        """
        classifier = self.classifier
        if isinstance(classifier, ClosedSetClassifier):
            raise UsageError('a closed-set head has no region embeddings: use MODEL.OVD.CLASSIFIER "text".')
        return classifier

    @property
    def feature_dim(self) -> int:
        """F, the number of features of a region after the box head."""
        return _width(self.box_head.output_shape)

    def pool(self, features: Mapping[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """RoIAlign on the pyramid.

        Args:
            features: maps of the backbone by name.
            boxes: boxes of each of the N images, in pixels of the network's input, on any device.

        Returns:
            Tensor [R, C, S, S] float32, of the boxes of all images in order.
        """
        # Detectron2's RoIAlign casts boxes to the dtype of the maps: in bfloat16 they would be off by pixels.
        levels = [features[name].float() for name in self.box_in_features]
        return self.box_pooler(levels, [of_image.to(levels[0].device) for of_image in boxes])

    def embed_boxes(self, features: Mapping[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Region embeddings of given boxes, in the space of the word embeddings.

        Args:
            features, boxes: as of :meth:`pool`.

        Returns:
            Tensor [R, D] float32, unit rows.

        Raises:
            UsageError: the head is closed-set.
        """
        return self.text_classifier.embed(self.box_head(self.pool(features, boxes)))

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        samples: Sequence[Sample] = (),
        parts: Sequence[RCNNPart] = (),
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """See :class:`StandardROIHeads`.

        Args:
            samples: samples of the N images, for the parts.
            parts: parts of the detector.

        Returns:
            As of StandardROIHeads: (sampled proposals, weighted losses, those of the parts after those of the box head)
            in training, (detections, {}) at test.

        Raises:
            UsageError: two losses have the same name, or two parts compute secondary scores.
            NumericalError: at test, a score, box or mask is not finite.
        """
        # Cast once for all pooling, so that gradients of the maps add up in float32. Why float32: see `pool`.
        features = {name: level.float() for name, level in features.items()}
        if self.training:
            assert targets is not None, "a training step needs targets"
            sampled = self.label_and_sample_proposals(proposals, targets)
            losses = self._box_losses(features, sampled, samples, parts)
            # Detectron2's method returns instances at test and losses in training.
            return sampled, joined(losses, cast(dict[str, Tensor], self._forward_mask(features, sampled)))
        pooled = self.pool(features, [of_image.proposal_boxes for of_image in proposals])
        batch = RegionBatch(samples, features, proposals, pooled, self.box_head(pooled), self)
        self._attach_secondary_probs(batch, parts)
        detections, _ = self.box_predictor.inference(self.box_predictor(batch.box_features), proposals)
        results = self.forward_with_given_boxes(features, detections)
        for of_image in results:
            if of_image.has("pred_masks") and not torch.isfinite(of_image.pred_masks).all():
                raise NumericalError(
                    "a mask is not finite: the training has diverged; use an earlier checkpoint."
                )  # pasted into the image, it would be empty
        return results, {}

    def _box_losses(
        self,
        features: Mapping[str, Tensor],
        sampled: list[Instances],
        samples: Sequence[Sample],
        parts: Sequence[RCNNPart],
    ) -> dict[str, Tensor]:
        """Weighted losses of the box head on ``sampled`` proposals, then those of the parts."""
        pooled = self.pool(features, [of_image.proposal_boxes for of_image in sampled])
        own = [self._pool_own(features, samples, part) for part in parts]
        shared = [regions for part, regions in zip(parts, own) if regions is not None and part.shares_head]
        # One pass: if the head has batch normalisation, all regions share its statistics, as at test.
        joint = self.box_head(torch.cat([pooled, *shared]) if shared else pooled)
        box_features, start = joint[: len(pooled)], len(pooled)
        predictions = self.box_predictor(box_features)
        groups = [self.box_predictor.losses(predictions, sampled)]
        batch = RegionBatch(samples, features, sampled, pooled, box_features, self)
        for part, regions in zip(parts, own):
            own_features = None
            if regions is not None and part.shares_head:
                own_features, start = joint[start : start + len(regions)], start + len(regions)
            of_part = replace(batch, own_pooled=regions, own_features=own_features)
            groups.append(weighted(part.losses(of_part), part))
        if self.train_on_pred_boxes:
            self._replace_by_predicted(sampled, predictions)
        return joined(*groups)

    def _pool_own(self, features: Mapping[str, Tensor], samples: Sequence[Sample], part: RCNNPart) -> Tensor | None:
        boxes = part.own_boxes(samples)
        if boxes is None:
            return None
        if len(boxes) != len(samples):
            raise UsageError(
                f"the part {part.name} gives own boxes of {len(boxes)} images in a batch of {len(samples)}: give an "
                "entry for each, possibly empty."
            )
        return self.pool(features, boxes)

    @torch.no_grad()
    def _replace_by_predicted(self, sampled, predictions):
        """Replace proposals by the boxes of the box head, to train masks on them (TRAIN_ON_PRED_BOXES)."""
        boxes = self.box_predictor.predict_boxes_for_gt_classes(predictions, sampled)
        for of_image, predicted in zip(sampled, boxes):
            of_image.proposal_boxes = Boxes(predicted)

    def _attach_secondary_probs(self, batch: RegionBatch, parts: Sequence[RCNNPart]) -> None:
        """Set ``secondary_probs`` of the proposals of each image, if a part computes them."""
        given = {part.name: part.secondary_probs(batch) for part in parts}
        given = {name: probs for name, probs in given.items() if probs is not None}
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(given)} both compute secondary scores of proposals: switch off all but the one that "
                "MODEL.OVD.SECONDARY_SCORES names."
            )
        words = len(self.classifier.vocabulary) if given else 0
        for name, probs in given.items():
            shapes = [tuple(of_image.shape) for of_image in probs]
            if [rows for rows, *_ in shapes] != batch.counts or any(
                shape[1:] not in ((words,), (words + 1,)) for shape in shapes
            ):
                raise UsageError(
                    f"the part {name} gives secondary scores of shapes {shapes}: give one tensor [R_i, {words}] or [R_i, "
                    f"{words + 1}] for each image, with R_i of {batch.counts}."
                )
            for of_image, probs_of_image in zip(batch.proposals, probs, strict=True):
                of_image.secondary_probs = probs_of_image


def build_similar_box_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> nn.Module:
    """Build a second box head like the detector's, with separate weights.

    Args:
        cfg: configuration.
        input_shape: of the backbone's maps.

    Returns:
        module, pooled features [R, C, S, S] -> [R, F].
    """
    side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    return build_box_head(cfg, ShapeSpec(channels=channels, height=side, width=side))


def _width(shape):
    """Number of values of a region after the box head, flattened."""
    return shape.channels * (shape.width or 1) * (shape.height or 1)


def _require_consistent(cfg):
    """Refuse settings without effect, and settings that would leave the text classifier untrained.

    Raises:
        UsageError: such a setting; the message names its key.
    """
    ovd = cfg.MODEL.OVD
    if ovd.BACKGROUND_WEIGHT < 0 or (ovd.BACKGROUND_WEIGHT != 1.0 and ovd.CLS_LOSS == "sigmoid"):
        raise UsageError(
            f"MODEL.OVD.BACKGROUND_WEIGHT is {ovd.BACKGROUND_WEIGHT}: it must not be negative, and with "
            'MODEL.OVD.CLS_LOSS "sigmoid", which has no background, it must be 1.'
        )
    if cfg.MODEL.MASK_ON and not cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
        raise UsageError(
            "class-specific masks are not available for novel words: set MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK to True."
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise UsageError("MODEL.KEYPOINT_ON is True: the open-vocabulary heads have no keypoint head.")
    if ovd.CLS_LOSS_WEIGHT == 0 and not any(method.trains_words(cfg) for method in methods_of(cfg)):
        raise UsageError(
            "MODEL.OVD.CLS_LOSS_WEIGHT is 0 and no method that trains the region embeddings is "
            "switched on: the text classifier would stay untrained."
        )
