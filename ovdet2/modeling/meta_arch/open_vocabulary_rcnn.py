"""Faster R-CNN whose classes are an input: wiring only.

Shapes: R proposals, K words.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_backbone, build_proposal_generator
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from ovdet2.errors import UsageError
from ovdet2.methods.vild.crop_scorer import CropScorer
from ovdet2.modeling.build import build_teacher, build_word_bank


@META_ARCH_REGISTRY.register()
class OpenVocabularyRCNN(GeneralizedRCNN):
    """ViLD's network (Gu et al., ICLR 2022): a class-agnostic Faster R-CNN that scores regions against words.

    At test each image gives {"instances", "proposals"}: detections whose ``pred_classes`` index the vocabulary, and the
    best proposals of the RPN (``proposal_boxes``, ``objectness_logits``), both in pixels of the original image.
    """

    @configurable
    def __init__(self, *, region_scorer=None, proposals_kept=0, **kwargs):
        """
        Args:
            region_scorer: None, or a module (image [3, H, W], boxes [R, 4]) -> probabilities [R, K] that is asked at
                test and whose answer the box predictor fuses.
            proposals_kept: proposals returned per image; 0 returns none.
            kwargs: backbone, proposal_generator, roi_heads, pixel_mean, pixel_std, input_format, vis_period.
        """
        super().__init__(**kwargs)
        self.region_scorer = region_scorer
        self.proposals_kept = proposals_kept

    @classmethod
    def from_config(cls, cfg, vocabulary=None):
        """Arguments by configuration; ``vocabulary`` replaces the one that MODEL.VOCABULARY and DATASETS.TEST give."""
        backbone = build_backbone(cfg)
        vocabulary = build_word_bank(cfg, vocabulary)
        scorer = None
        if cfg.MODEL.OVD.SECONDARY_SCORES == "crops":
            scorer = CropScorer(build_teacher(cfg), vocabulary, cfg.INPUT.FORMAT)
        roi_heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            "roi_heads": roi_heads(cfg, backbone.output_shape(), vocabulary),
            "region_scorer": scorer,
            "proposals_kept": cfg.TEST.PROPOSALS_PER_IMAGE,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def vocabulary(self):
        """The :class:`~ovdet2.layers.WordBank`; ``model.vocabulary.set(v)`` changes the words."""
        return self.roi_heads.box_predictor.cls_score.vocabulary

    def forward(self, batched_inputs):
        """Losses of a batch in training (see :class:`GeneralizedRCNN`), :meth:`inference` otherwise.

        With distillation a record also holds "regions", :class:`Instances` with ``proposal_boxes`` in pixels of its
        image and the teacher's ``embeddings`` [R, D].
        """
        if not self.training or not self.roi_heads.distillation_weight:
            return super().forward(batched_inputs)
        if not all("regions" in record for record in batched_inputs):
            raise UsageError(
                "MODEL.VILD.WEIGHT is above 0 but the records hold no cached regions: set "
                "MODEL.VILD.REGION_CACHE and load the data with OpenVocabularyMapper."
            )
        images = self.preprocess_image(batched_inputs)
        targets = [record["instances"].to(self.device) for record in batched_inputs]
        regions = [record["regions"].to(self.device) for record in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, targets)
        _, head_losses = self.roi_heads(images, features, proposals, targets, regions)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return head_losses | losses

    @torch.no_grad()
    def propose(self, batched_inputs):
        """The RPN alone, in evaluation mode: list of :class:`Instances` with ``proposal_boxes`` (pixels of the original
        image) and ``objectness_logits``, best first."""
        if self.training:
            raise UsageError("proposals are asked of a model in evaluation mode: call model.eval() first.")
        _, _, proposals = self._propose(batched_inputs)
        return [_to_original_pixels(found, inputs) for found, inputs in zip(proposals, batched_inputs)]

    def _propose(self, batched_inputs):
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        return images, features, self.proposal_generator(images, features, None)[0]

    def inference(self, batched_inputs, detected_instances=None, do_postprocess=True):
        """Detect in a batch; see :class:`GeneralizedRCNN` for the arguments."""
        if detected_instances is not None:
            return super().inference(batched_inputs, detected_instances, do_postprocess)
        images, features, proposals = self._propose(batched_inputs)
        self.ask_second_branch(batched_inputs, features, proposals)
        results, _ = self.roi_heads(images, features, proposals, None)
        if not do_postprocess:
            return results
        outputs = self._postprocess(results, batched_inputs, images.image_sizes)
        if self.proposals_kept:
            for output, inputs, found in zip(outputs, batched_inputs, proposals):
                output["proposals"] = _to_original_pixels(found[: self.proposals_kept], inputs)
        return outputs

    def ask_second_branch(self, batched_inputs, features, proposals):
        """Attach ``secondary_probs`` [R, K] to the proposals of each image, where something but the heads gives them.

        Args:
            batched_inputs: records.
            features: dict of maps of the backbone.
            proposals: list of :class:`Instances` with ``proposal_boxes`` in pixels of the network's input.
        """
        if self.region_scorer is None:
            return
        for inputs, found in zip(batched_inputs, proposals):
            found.secondary_probs = self.region_scorer(inputs["image"], found.proposal_boxes.tensor)


def _to_original_pixels(proposals, inputs):
    """Proposals of one image scaled from the network input to the ``height`` and ``width`` of the record."""
    height, width = proposals.image_size
    out_height, out_width = inputs.get("height", height), inputs.get("width", width)
    boxes = Boxes(proposals.proposal_boxes.tensor.clone())
    boxes.scale(out_width / width, out_height / height)
    return Instances((out_height, out_width), proposal_boxes=boxes, objectness_logits=proposals.objectness_logits)
