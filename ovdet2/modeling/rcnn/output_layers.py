"""Box predictor of the open-vocabulary R-CNN: Detectron2's FastRCNNOutputLayers with an exchangeable classifier.

Shapes: R regions, C channels, K words.
Names: ``pred_`` predicted, ``gt_`` ground truth, ``_logits`` before softmax or sigmoid,
``_probs`` probabilities in [0, 1], ``_deltas`` box regression relative to proposals or references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from ovdet2.errors import NumericalError, UsageError
from ovdet2.layers import ClosedSetClassifier, CosineClassifier, class_wise_nms, fuse_scores, fusion_exponents
from ovdet2.modeling.losses import background_weighted_cross_entropy, federated_words, sigmoid_classification

Classifier = CosineClassifier | ClosedSetClassifier

SECONDARY_USES = ("fuse", "only", "only_objectness")
SECONDARY_BACKGROUNDS = ("none", "text", "objectness")
BOX_AVERAGES = ("sampled", "positives")


class OpenVocabularyOutputLayers(FastRCNNOutputLayers):
    """Class-agnostic box regression, a given classifier, and the fusion of its scores with secondary scores.

    Secondary scores are the field ``secondary_probs`` [R, K] or [R, K + 1] of the proposals; without the field only
    the classifier's scores are used. Losses are Detectron2's: softmax cross-entropy averaged over the sampled regions,
    smooth L1 on positives. Background regions may have a lower weight in the cross-entropy. With a sigmoid per word
    the cross-entropy is binary and may be federated.

    Attributes:
        cls_score: the classifier, under Detectron2's name.
        federated_weights: see the constructor.
    """

    cls_score: Classifier  # pyrefly: ignore[bad-override]  Detectron2: an nn.Linear that is only called
    federated_weights: Tensor | None

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        classifier: Classifier,
        secondary_use: str = "fuse",
        secondary_background: str = "none",
        box_average: str = "sampled",
        fusion_base: float = 1 / 3,
        fusion_novel: float = 2 / 3,
        renormalize: bool = False,
        background_weight: float = 1.0,
        federated: int = 0,
        federated_weights: Tensor | None = None,
        **kwargs,
    ):
        """
        Args:
            input_shape: :class:`ShapeSpec` of the box head's output.
            classifier: module, [R, C] -> logits with background last.
            secondary_use: what to do with ``secondary_probs``, one of SECONDARY_USES.
            secondary_background: what the secondary scores are multiplied by, one of SECONDARY_BACKGROUNDS: nothing, 1
                minus the classifier's probability of background, or the objectness of the proposal.
            box_average: the box loss is averaged over all sampled regions, or over the coordinates of positive ones.
            fusion_base, fusion_novel: exponents of the secondary scores in "fuse".
            renormalize: in "fuse", normalise the fused scores and the background score of a region to sum 1.
            background_weight: weight of the cross-entropy of background regions; the mean is over all regions.
            federated: number of words in the loss of a batch, for the sigmoid classifier; 0: all.
            federated_weights: Tensor [B], sampling weights of words without an annotation in the batch.
            kwargs: as of :class:`FastRCNNOutputLayers`.
        """
        super().__init__(input_shape, num_classes=classifier.num_training_classes, cls_agnostic_bbox_reg=True, **kwargs)
        _require_choice("MODEL.OVD.SECONDARY_USE", secondary_use, SECONDARY_USES)
        _require_choice("MODEL.OVD.SECONDARY_BACKGROUND", secondary_background, SECONDARY_BACKGROUNDS)
        _require_choice("MODEL.ROI_BOX_HEAD.BBOX_REG_AVERAGE", box_average, BOX_AVERAGES)
        if secondary_background != "none" and secondary_use == "only_objectness":
            raise UsageError(
                'MODEL.OVD.SECONDARY_USE "only_objectness" keeps background low already: set SECONDARY_BACKGROUND to none.'
            )
        if secondary_background == "text" and classifier.per_word:
            raise UsageError(
                'MODEL.OVD.SECONDARY_BACKGROUND "text" needs a background class, which CLS_LOSS "sigmoid" has not: choose '
                '"objectness".'
            )
        self.secondary_background = secondary_background
        self.box_average = box_average
        self.cls_score = classifier
        self.secondary_use = secondary_use
        self.fusion_base = fusion_base
        self.fusion_novel = fusion_novel
        self.renormalize = renormalize
        self.background_weight = background_weight
        self.federated = federated
        self.register_buffer("federated_weights", federated_weights, persistent=False)

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: ShapeSpec, classifier: Classifier
    ) -> dict[str, Any]:
        """Arguments from a configuration; ``classifier`` as in the constructor."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        del arguments["num_classes"], arguments["cls_agnostic_bbox_reg"]
        arguments["loss_weight"] = {**arguments["loss_weight"], "loss_cls": cfg.MODEL.OVD.CLS_LOSS_WEIGHT}
        return arguments | {
            "classifier": classifier,
            "secondary_use": cfg.MODEL.OVD.SECONDARY_USE,
            "secondary_background": cfg.MODEL.OVD.SECONDARY_BACKGROUND,
            "box_average": cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_AVERAGE,
            "fusion_base": cfg.MODEL.OVD.FUSION_BASE,
            "fusion_novel": cfg.MODEL.OVD.FUSION_NOVEL,
            "renormalize": cfg.MODEL.OVD.FUSION_RENORMALIZE,
            "background_weight": cfg.MODEL.OVD.BACKGROUND_WEIGHT,
            "federated": cfg.MODEL.OVD.FEDERATED_WORDS,
            "federated_weights": federated_weights(cfg, classifier),
        }

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> dict[str, Tensor]:
        """See :class:`FastRCNNOutputLayers`."""
        losses = super().losses(predictions, proposals)
        if not self.cls_score.per_word and self.background_weight == 1.0:
            return losses
        labels = torch.cat([p.gt_classes for p in proposals])
        if self.cls_score.per_word:
            words = None
            if self.federated:
                if self.federated_weights is None:
                    raise UsageError(
                        "MODEL.OVD.FEDERATED_WORDS needs the class counts of DATASETS.TRAIN: load them before building the model."
                    )
                words = federated_words(labels, self.federated_weights, self.federated)
            loss = sigmoid_classification(predictions[0][:, :-1], labels, words)
        else:
            loss = background_weighted_cross_entropy(predictions[0], labels, self.background_weight)
        return losses | {"loss_cls": loss * self.loss_weight.get("loss_cls", 1.0)}

    def predict_probs(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> list[Tensor]:
        """Probabilities per image, list of [R, K + 1] with background last (0 for a sigmoid per word), after fusion."""
        logits, _ = predictions
        counts = [len(p) for p in proposals]
        if self.cls_score.per_word:
            probs = F.pad(logits[:, :-1].float().sigmoid(), (0, 1)).split(counts)
        else:
            probs = F.softmax(logits.float(), dim=1).split(counts)
        return [self._with_secondary_probs(p, instances) for p, instances in zip(probs, proposals)]

    def _with_secondary_probs(self, probs: Tensor, proposals: Instances) -> Tensor:
        if not proposals.has("secondary_probs"):
            return probs
        secondary = self._with_background(proposals.secondary_probs, probs, proposals)
        if self.secondary_use == "fuse":
            mask = self.cls_score.vocabulary.base_mask
            exponents = fusion_exponents(mask, self.fusion_base, self.fusion_novel)
            return fuse_scores(probs, secondary, exponents, self.renormalize)
        if self.secondary_use == "only_objectness":  # the geometric mean of objectness and class probability
            secondary = (secondary * proposals.objectness_logits.float().sigmoid()[:, None]).sqrt()
        return fuse_scores(probs, secondary, 1.0)

    def _with_background(self, secondary: Tensor, probs: Tensor, proposals: Instances) -> Tensor:
        """Secondary scores [R, K] times what SECONDARY_BACKGROUND says.

        Raises:
            UsageError: there is a factor, and the secondary scores [R, K + 1] have a background.
        """
        if self.secondary_background == "none":
            return secondary
        if secondary.shape[1] == probs.shape[1]:
            raise UsageError(
                f'MODEL.OVD.SECONDARY_BACKGROUND is "{self.secondary_background}", but these secondary scores have a '
                'background: set it to "none".'
            )
        if self.secondary_background == "text":
            return secondary * (1 - probs[:, -1:])
        return secondary * proposals.objectness_logits.float().sigmoid()[:, None]

    def box_reg_loss(self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor) -> Tensor:
        """See :class:`FastRCNNOutputLayers`; averaged as the constructor's ``box_average`` says."""
        loss = super().box_reg_loss(proposal_boxes, gt_boxes, pred_deltas, gt_classes)
        if self.box_average == "sampled":
            return loss
        positive = ((gt_classes >= 0) & (gt_classes < self.num_classes)).sum()
        return loss * gt_classes.numel() / (4 * positive).clamp(min=1)

    def inference(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Detections per image.

        Returns:
            (list of :class:`Instances` with pred_boxes, scores, pred_classes; list of region indices).

        Raises:
            NumericalError: a score or box is not finite. (Detectron2 drops such detections silently, which lowers AP.)
        """
        boxes = self.predict_boxes(predictions, proposals)
        return self.select(boxes, self.predict_probs(predictions, proposals), [image.image_size for image in proposals])

    def select(
        self,
        boxes_of_images: Sequence[Tensor],
        probs_of_images: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> tuple[list[Instances], list[Tensor]]:
        """Detections of scored boxes: boxes are clipped, then come the score threshold, NMS and the best scores.

        Args:
            boxes_of_images: for each image, XYXY Tensor [R, 4].
            probs_of_images: for each image, Tensor [R, K + 1] with background last.
            image_sizes: (height, width) of each image.

        Returns, raises:
            As of :meth:`inference`.
        """
        results, kept = [], []
        vocabulary = self.cls_score.vocabulary
        for boxes, probs, size in zip(boxes_of_images, probs_of_images, image_sizes):
            require_finite(probs, boxes)  # before clipping, which fails with an assertion
            clipped = Boxes(boxes.float())
            clipped.clip(size)
            scores = probs[:, : vocabulary.num_detectable]  # without negative words, competitors and background
            if self.cls_score.per_word and vocabulary.num_negative:
                scores = scores.masked_fill(vocabulary.on_negative_words(probs)[:, None], -torch.inf)
            regions, classes = class_wise_nms(
                clipped.tensor, scores, self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image
            )
            results.append(
                Instances(size, pred_boxes=clipped[regions], scores=scores[regions, classes], pred_classes=classes)
            )
            kept.append(regions)
        return results, kept


def require_finite(*values: Tensor) -> None:
    """Raise :class:`NumericalError` if a score or box is not finite."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise NumericalError(
            "a detection has a score or box that is not finite: the training has diverged; use an earlier checkpoint."
        )


def _require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{key} is {value!r}: choose one of {', '.join(choices)}.")


def federated_weights(cfg: CfgNode, classifier: Classifier) -> Tensor | None:
    """Image counts of the training sets' base classes to the power MODEL.OVD.FEDERATED_POWER.

    Returns:
        Tensor [B]; None without federated loss, or if the training sets are not loaded, as at test.

    Raises:
        UsageError: the loss or one of its options is unknown, or they contradict each other.
    """
    ovd = cfg.MODEL.OVD
    if ovd.CLS_LOSS not in ("softmax", "sigmoid"):
        raise UsageError(f'MODEL.OVD.CLS_LOSS is {ovd.CLS_LOSS!r}: choose "softmax" or "sigmoid".')
    if ovd.CLS_LOSS == "sigmoid" and ovd.CLASSIFIER != "text":
        raise UsageError('MODEL.OVD.CLS_LOSS "sigmoid" requires MODEL.OVD.CLASSIFIER "text".')
    if not ovd.FEDERATED_WORDS:
        return None
    if ovd.FEDERATED_POWER < 0:
        raise UsageError(f"MODEL.OVD.FEDERATED_POWER is {ovd.FEDERATED_POWER}: it must not be negative.")
    if ovd.CLS_LOSS != "sigmoid" or ovd.FEDERATED_WORDS < 0:
        raise UsageError(
            f'MODEL.OVD.FEDERATED_WORDS is {ovd.FEDERATED_WORDS}: set it to 0, or MODEL.OVD.CLS_LOSS to "sigmoid".'
        )
    counts = [MetadataCatalog.get(name).get("ov_image_counts") for name in cfg.DATASETS.TRAIN]
    if any(of_set is None for of_set in counts):
        return None  # no training in this process: the training sets are not loaded
    return torch.tensor(counts).sum(dim=0)[: classifier.num_training_classes].float() ** ovd.FEDERATED_POWER
