"""Detectron2's StandardROIHeads with the open-vocabulary box predictor and ViLD's image branch.

Shapes: R regions, C channels, S pooled side, K words, D embedding dimension.
"""

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads, build_box_head
from torch import nn

from ovdet2.errors import UsageError
from ovdet2.layers import EmbeddingProjection
from ovdet2.modeling.build import build_classifier
from ovdet2.modeling.losses import embedding_l1
from ovdet2.modeling.rcnn.output_layers import OpenVocabularyOutputLayers

SECOND_BRANCHES = ("none", "image", "crops", "map")


class ImageHead(nn.Module):
    """ViLD-ensemble's second head: a box head and a projection that only distillation trains."""

    def __init__(self, box_head, input_dim, embed_dim):
        """
        Args:
            box_head: module, pooled features [R, C, S, S] -> [R, input_dim].
            embed_dim: D.
        """
        super().__init__()
        self.box_head = box_head
        self.projection = EmbeddingProjection(input_dim, embed_dim)

    def forward(self, pooled):
        """Pooled features [R, C, S, S] -> unit embeddings [R, D], float32."""
        return self.projection(self.box_head(pooled))


@ROI_HEADS_REGISTRY.register()
class OpenVocabularyROIHeads(StandardROIHeads):
    """Box head, class-agnostic regression, a classifier over the vocabulary it is given, and distillation.

    The label of background, and so the only class count, is read from the classifier. The *image branch* is the
    embedding that distillation trains: of the classifier's own head (ViLD, ViLD-image) or of a second one
    (ViLD-ensemble). Distilled regions are no part of sampling, classification and box regression.
    """

    @configurable
    def __init__(self, *, image_head=None, distillation_weight=0.0, scores_images=False, **kwargs):
        """
        Args:
            image_head: None for the classifier's own head, or an :class:`ImageHead`.
            distillation_weight: w of ViLD's loss.
            scores_images: at test, attach the image branch's probabilities to the proposals as ``secondary_probs``.
            kwargs: of :class:`StandardROIHeads`.
        """
        super().__init__(**kwargs)
        self.image_head = image_head
        self.distillation_weight = distillation_weight
        self.scores_images = scores_images

    @classmethod
    def from_config(cls, cfg, input_shape, vocabulary):
        _require_consistent(cfg)
        arguments = super().from_config(cfg, input_shape)
        head_shape = arguments["box_head"].output_shape
        width = head_shape.channels * (head_shape.width or 1) * (head_shape.height or 1)
        classifier = build_classifier(cfg, width, vocabulary)
        arguments["num_classes"] = classifier.num_training_classes
        arguments["box_predictor"] = OpenVocabularyOutputLayers(cfg, head_shape, classifier)
        if cfg.MODEL.VILD.OWN_HEAD:
            side = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
            channels = input_shape[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
            box_head = build_box_head(cfg, ShapeSpec(channels=channels, height=side, width=side))
            arguments["image_head"] = ImageHead(box_head, width, vocabulary.embeddings.shape[1])
        return arguments | {
            "distillation_weight": cfg.MODEL.VILD.WEIGHT,
            "scores_images": cfg.MODEL.OVD.SECONDARY_SCORES == "image",
        }

    def forward(self, images, features, proposals, targets=None, regions=None):
        """See :class:`StandardROIHeads`.

        Args:
            regions: in training with distillation, list of :class:`Instances` with ``proposal_boxes`` and the teacher's
                ``embeddings`` [R, D]; one per image, possibly empty.

        Returns:
            As of StandardROIHeads; in training the losses may hold "loss_distillation", weighted.
        """
        # Detectron2's RoIAlign rounds boxes to the type of the maps: in bfloat16 they would be pixels off.
        features = {name: level.float() for name, level in features.items()}
        if not self.training or not self.distillation_weight:
            return super().forward(images, features, proposals, targets)
        sampled = self.label_and_sample_proposals(proposals, targets)
        losses = self._box_losses(features, sampled, regions)
        losses.update(self._forward_mask(features, sampled))
        return sampled, losses

    def _box_losses(self, features, sampled, regions):
        """Losses of the box head on ``sampled`` proposals and of distillation on ``regions``."""
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [p.proposal_boxes for p in sampled])  # [R, C, S, S]
        distilled = self.box_pooler(levels, [r.proposal_boxes for r in regions])
        teacher = torch.cat([r.embeddings for r in regions])
        if self.image_head is None:
            # One pass: where the head has batch statistics, both kinds of regions share them, as they will at test.
            joint = self.box_head(torch.cat([pooled, distilled]))
            box_features, student = joint[: len(pooled)], self.box_predictor.cls_score.embed(joint[len(pooled) :])
        else:
            box_features = self.box_head(pooled)
            # A batch without a region still runs the head, for every process must give its parameters a gradient.
            student = self.image_head(distilled if len(distilled) else pooled[:2])[: len(distilled)]
        losses = self.box_predictor.losses(self.box_predictor(box_features), sampled)
        return losses | {"loss_distillation": self.distillation_weight * embedding_l1(student, teacher)}

    def _forward_box(self, features, proposals):
        if self.training or not self.scores_images:
            return super()._forward_box(features, proposals)
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [p.proposal_boxes for p in proposals])
        box_features = self.box_head(pooled)
        classifier = self.box_predictor.cls_score
        embeddings = classifier.embed(box_features) if self.image_head is None else self.image_head(pooled)
        probs = classifier.classify_without_background(embeddings)
        for found, of_image in zip(proposals, probs.split([len(p) for p in proposals])):
            found.secondary_probs = of_image
        return self.box_predictor.inference(self.box_predictor(box_features), proposals)[0]


def _require_consistent(cfg):
    """Refuse switches that would do nothing, or that would leave what scores the words untrained.

    Raises:
        UsageError: names the keys.
    """
    ovd, distillation = cfg.MODEL.OVD, cfg.MODEL.VILD
    if ovd.SECONDARY_SCORES not in SECOND_BRANCHES:
        raise UsageError(
            f"MODEL.OVD.SECONDARY_SCORES is {ovd.SECONDARY_SCORES!r}: choose one of {', '.join(SECOND_BRANCHES)}."
        )
    if ovd.SECONDARY_SCORES == "map" and cfg.MODEL.META_ARCHITECTURE != "FrozenVLMRCNN":
        raise UsageError(
            'MODEL.OVD.SECONDARY_SCORES "map" needs a trunk that is CLIP: set MODEL.META_ARCHITECTURE to FrozenVLMRCNN.'
        )
    if ovd.BACKGROUND_WEIGHT < 0 or (ovd.BACKGROUND_WEIGHT != 1.0 and ovd.CLS_LOSS == "sigmoid"):
        raise UsageError(
            f"MODEL.OVD.BACKGROUND_WEIGHT is {ovd.BACKGROUND_WEIGHT}: it must not be negative, and with "
            'MODEL.OVD.CLS_LOSS "sigmoid", which has no background, it must be 1.'
        )
    if distillation.WEIGHT < 0:
        raise UsageError(f"MODEL.VILD.WEIGHT is {distillation.WEIGHT}: it must not be negative.")
    if cfg.MODEL.MASK_ON and not cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
        raise UsageError(
            "a mask per class cannot be asked for new words: set MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK to True."
        )
    if cfg.MODEL.KEYPOINT_ON:
        raise UsageError("MODEL.KEYPOINT_ON is True: the open-vocabulary heads know no keypoints.")
    image_branch = distillation.WEIGHT > 0 or ovd.SECONDARY_SCORES == "image"
    if image_branch and ovd.CLASSIFIER != "text":
        raise UsageError(
            f'MODEL.OVD.CLASSIFIER is {ovd.CLASSIFIER!r}, but only "text" has an embedding to distil into: set '
            "MODEL.VILD.WEIGHT to 0 and MODEL.OVD.SECONDARY_SCORES to none."
        )
    if distillation.WEIGHT == 0:
        if distillation.OWN_HEAD:
            raise UsageError("MODEL.VILD.OWN_HEAD without a MODEL.VILD.WEIGHT: nothing trains that head.")
        if ovd.CLS_LOSS_WEIGHT == 0:
            raise UsageError(
                "MODEL.OVD.CLS_LOSS_WEIGHT and MODEL.VILD.WEIGHT are both 0: nothing learns what a region is."
            )
        return
    if distillation.REGIONS_PER_IMAGE < 1:
        raise UsageError(
            f"MODEL.VILD.REGIONS_PER_IMAGE is {distillation.REGIONS_PER_IMAGE}: at least 1, or set "
            "MODEL.VILD.WEIGHT to 0."
        )
    if distillation.OWN_HEAD and ovd.SECONDARY_SCORES != "image":
        raise UsageError('MODEL.VILD.OWN_HEAD trains a head that only MODEL.OVD.SECONDARY_SCORES "image" asks.')
    if ovd.CLS_LOSS_WEIGHT == 0:
        if distillation.OWN_HEAD:
            raise UsageError("MODEL.OVD.CLS_LOSS_WEIGHT 0 with MODEL.VILD.OWN_HEAD leaves the classifier untrained.")
        if ovd.SECONDARY_SCORES != "image" or ovd.SECONDARY_USE == "fuse":
            raise UsageError(
                "MODEL.OVD.CLS_LOSS_WEIGHT 0 leaves background untrained: score words by the image branch alone, "
                'MODEL.OVD.SECONDARY_SCORES "image" with SECONDARY_USE "only" or "only_objectness".'
            )
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
        raise UsageError("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES does not go with distillation: set it to False.")
