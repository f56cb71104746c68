"""Box predictions of the open-vocabulary R-CNN: Detectron2's layer with an exchangeable classifier.

Shapes: R regions, C channels, K words.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from ovdet2.errors import NumericalError, UsageError
from ovdet2.layers import class_wise_nms, fuse_scores, fusion_exponents

SECOND_BRANCH_USES = ("fuse", "only", "only_objectness")


class OpenVocabularyOutputLayers(FastRCNNOutputLayers):
    """Class-agnostic boxes, a classifier that is passed in, and the fusion of its scores with a second branch.

    A second branch leaves its probabilities as ``second_probs`` [R, K] of the proposals; without the field the
    classifier's stand. Losses are Detectron2's: softmax cross-entropy averaged over the sampled regions, smooth L1 on
    positives.
    """

    @configurable
    def __init__(
        self, input_shape, *, classifier, second_branch_use="fuse", fusion_base=1 / 3, fusion_novel=2 / 3, **kwargs
    ):
        """
        Args:
            input_shape: :class:`ShapeSpec` of the box head's output.
            classifier: module, [R, C] -> logits with background last; has ``num_training_classes`` and ``vocabulary``.
            second_branch_use: what to do with ``second_probs``, one of SECOND_BRANCH_USES.
            fusion_base, fusion_novel: exponents of the second branch in "fuse".
            kwargs: of :class:`FastRCNNOutputLayers`.
        """
        super().__init__(input_shape, num_classes=classifier.num_training_classes, cls_agnostic_bbox_reg=True, **kwargs)
        if second_branch_use not in SECOND_BRANCH_USES:
            raise UsageError(
                f"MODEL.OVD.SECOND_BRANCH_USE is {second_branch_use!r}: choose one of {', '.join(SECOND_BRANCH_USES)}."
            )
        self.cls_score = classifier
        self.second_branch_use = second_branch_use
        self.fusion_base = fusion_base
        self.fusion_novel = fusion_novel

    @classmethod
    def from_config(cls, cfg, input_shape, classifier):
        arguments = super().from_config(cfg, input_shape)
        del arguments["num_classes"], arguments["cls_agnostic_bbox_reg"]
        arguments["loss_weight"] = {**arguments["loss_weight"], "loss_cls": cfg.MODEL.OVD.CLS_LOSS_WEIGHT}
        return arguments | {
            "classifier": classifier,
            "second_branch_use": cfg.MODEL.OVD.SECOND_BRANCH_USE,
            "fusion_base": cfg.MODEL.OVD.FUSION_BASE,
            "fusion_novel": cfg.MODEL.OVD.FUSION_NOVEL,
        }

    def predict_probs(self, predictions, proposals):
        """Probabilities per image, list of [R, K + 1] with background last, after any fusion."""
        logits, _ = predictions
        counts = [len(p) for p in proposals]
        probs = F.softmax(logits.float(), dim=1).split(counts)
        return [self._with_second_branch(p, instances) for p, instances in zip(probs, proposals)]

    def _with_second_branch(self, probs, proposals):
        if not proposals.has("second_probs"):
            return probs
        second = proposals.second_probs
        if self.second_branch_use == "fuse":
            mask = self.cls_score.vocabulary.base_mask
            return fuse_scores(probs, second, fusion_exponents(mask, self.fusion_base, self.fusion_novel))
        if self.second_branch_use == "only_objectness":  # the geometric mean of objectness and class probability
            second = (second * proposals.objectness_logits.float().sigmoid()[:, None]).sqrt()
        return fuse_scores(probs, second, 1.0)

    def inference(self, predictions, proposals):
        """Detections per image.

        Returns:
            (list of :class:`Instances` with pred_boxes, scores, pred_classes; list of region indices).

        Raises:
            NumericalError: a score or box is not finite; dropped silently, it would look like a low AP.
        """
        results, kept = [], []
        boxes_of_images = self.predict_boxes(predictions, proposals)
        for boxes, probs, image in zip(boxes_of_images, self.predict_probs(predictions, proposals), proposals):
            clipped = Boxes(boxes.float())
            clipped.clip(image.image_size)
            scores = probs[:, :-1]
            if not (torch.isfinite(scores).all() and torch.isfinite(boxes).all()):
                raise NumericalError(
                    "a detection has a score or box that is not finite: the training has diverged, "
                    "use an earlier checkpoint."
                )
            regions, classes = class_wise_nms(
                clipped.tensor, scores, self.test_score_thresh, self.test_nms_thresh, self.test_topk_per_image
            )
            results.append(
                Instances(
                    image.image_size, pred_boxes=clipped[regions], scores=scores[regions, classes], pred_classes=classes
                )
            )
            kept.append(regions)
        return results, kept
