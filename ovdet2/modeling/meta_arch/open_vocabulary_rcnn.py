"""Open-vocabulary Faster R-CNN, whose classes are an input: wiring only.

Shapes: N images, R proposals, K words. Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid,
``_probs`` probabilities in [0, 1].
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast, overload

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_backbone, build_proposal_generator
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ovdet2.config import check_methods, methods_of
from ovdet2.data.samples import BOXES, Sample, as_samples, of_kind
from ovdet2.errors import UsageError
from ovdet2.layers import ClosedSetClassifier
from ovdet2.modeling.build import build_word_bank
from ovdet2.modeling.host import Host
from ovdet2.modeling.part import build_parts, joined, register_parts, require_seen, weighted
from ovdet2.modeling.rcnn.part import RCNNPart, WeakBatch
from ovdet2.modeling.rcnn.roi_heads import OpenVocabularyROIHeads, build_similar_box_head
from ovdet2.modeling.rcnn.rpn_head import require_finite_at_test, require_norms_are_read
from ovdet2.modeling.square import checked_side, pad_to_square
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank

Batch = Sequence[Sample | Mapping[str, Any]]


@META_ARCH_REGISTRY.register()
class OpenVocabularyRCNN(GeneralizedRCNN):
    """A class-agnostic Faster R-CNN that classifies regions by word embeddings, with the parts of methods.

    At test the output of an image is {"instances", "proposals"}: detections whose ``pred_classes`` index the
    vocabulary, and the best proposals of the RPN (``proposal_boxes``, ``objectness_logits``), both in pixels of the
    original image.

    Attributes:
        roi_heads: box head, text classifier, mask head.
        parts: tuple of :class:`RCNNPart`, each also a submodule under its name.
    """

    # Detectron2 annotates it as nn.Module.
    roi_heads: OpenVocabularyROIHeads  # pyrefly: ignore[bad-override-mutable-attribute]
    parts: tuple[RCNNPart, ...]

    @configurable
    def __init__(self, *, parts: Sequence[RCNNPart] = (), proposals_kept: int = 0, square: int = 0, **kwargs):
        """
        Args:
            parts: parts of methods, with their names.
            proposals_kept: proposals returned per image; 0 returns none.
            square: side in pixels of the square that images are padded to; 0 pads a batch to its largest image.
            kwargs: backbone, proposal_generator, roi_heads, pixel_mean, pixel_std, input_format, vis_period.

        Raises:
            UsageError: a name of a part is empty or used twice.
        """
        super().__init__(**kwargs)
        self.proposals_kept = proposals_kept
        self.square = square
        self.parts = register_parts(self, parts, RCNNPart)
        head = getattr(self.proposal_generator, "rpn_head", None)  # other generators have none
        if isinstance(head, nn.Module):
            head.register_forward_hook(require_finite_at_test)

    @classmethod
    def from_config(cls, cfg: CfgNode, vocabulary: Vocabulary | None = None) -> dict[str, Any]:
        """Arguments from a configuration.

        Args:
            cfg: configuration.
            vocabulary: replaces the one that MODEL.VOCABULARY and DATASETS.TEST give.

        Raises:
            UsageError: settings of the heads or of a method contradict each other.
        """
        check_methods(cfg)
        require_norms_are_read(cfg)
        _require_form_is_read(cfg)
        backbone = build_backbone(cfg)
        bank = build_word_bank(cfg, vocabulary)
        shapes = cast(dict[str, ShapeSpec], backbone.output_shape())
        proposal_generator = build_proposal_generator(cfg, shapes)
        roi_heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, shapes, bank)
        # Parts come last: the detector's initial weights do not depend on them.
        host = Host(bank, backbone, roi_heads=roi_heads, build_box_head=partial(build_similar_box_head, cfg, shapes))
        return {
            "backbone": backbone,
            "proposal_generator": proposal_generator,
            "roi_heads": roi_heads,
            "parts": build_parts(cfg, methods_of(cfg), host),
            "proposals_kept": cfg.TEST.PROPOSALS_PER_IMAGE,
            "square": checked_side(cfg, backbone.size_divisibility),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def vocabulary(self) -> WordBank:
        """The detector's words; ``model.vocabulary.set(v)`` changes them."""
        return self.roi_heads.classifier.vocabulary

    @property
    def words_compete(self) -> bool:
        """Whether the score of a word depends on the other words of the vocabulary, which may be exchanged."""
        classifier = self.roi_heads.classifier
        secondary = any(type(part).secondary_probs is not RCNNPart.secondary_probs for part in self.parts)
        return not isinstance(classifier, ClosedSetClassifier) and (secondary or not classifier.per_word)

    def forward(self, batched_inputs: Batch) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: N samples or Detectron2 records with ``image``; in training ``instances`` of those of kind
                "boxes", and what the parts read.

        Returns:
            In training, weighted losses by name: of the box head, the parts, masks, the RPN, then of images without
            boxes. Losses of a kind of images that is not in the batch are absent. At test see :meth:`inference`.

        Raises:
            UsageError: no part has losses for a kind of images.
        """
        samples = as_samples(batched_inputs)
        if not self.training:
            return self.inference(samples)
        require_seen(self.parts, (sample.kind for sample in samples))
        boxed = of_kind(samples, BOXES)
        others = [sample for sample in samples if sample.kind != BOXES]
        # Images with boxes first: autocast caches its casts of weights. If the RPN's were first cast under no_grad, for
        # the other images, the cached casts would have no gradient.
        losses = self._losses(boxed) if boxed else {}
        return joined(losses, self._weak_losses(others) if others else {})

    def _losses(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Weighted losses on images with boxes."""
        images = self._images(samples)
        targets = [sample["instances"].to(self.device) for sample in samples]
        features = self.backbone(images.tensor)
        proposals, losses = self.proposal_generator(images, features, targets)
        _, head_losses = self.roi_heads(images, features, proposals, targets, samples, self.parts)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(samples, proposals)
        return joined(head_losses, losses)

    def _weak_losses(self, samples: list[Sample]) -> dict[str, Tensor]:
        """Weighted losses on images without boxes. The RPN runs in evaluation mode without gradient, so its weights,
        batch statistics, random numbers and metrics do not change."""
        images = self._images(samples)
        features = self.backbone(images.tensor)
        with torch.no_grad(), _evaluating(self.proposal_generator):
            proposals, _ = self.proposal_generator(images, features, None)
        batch = WeakBatch(samples, features, proposals, self.roi_heads)
        seen = [(part, batch.only(part.sees)) for part in self.parts]
        return joined(*(weighted(part.weak_losses(own), part) for part, own in seen if own is not None))

    @torch.no_grad()
    def propose(self, batched_inputs: Batch) -> list[Instances]:
        """Proposals of the RPN, in evaluation mode: list of :class:`Instances` with ``proposal_boxes`` (pixels of the
        original image) and ``objectness_logits``, best first."""
        if self.training:
            raise UsageError("propose() requires evaluation mode: call model.eval() first.")
        samples = as_samples(batched_inputs)
        _, _, proposals = self._propose(samples)
        return [_to_original_pixels(of_image, sample) for of_image, sample in zip(proposals, samples)]

    def _propose(self, samples: list[Sample]) -> tuple[ImageList, dict[str, Tensor], list[Instances]]:
        images = self._images(samples)
        features = self.backbone(images.tensor)
        return images, features, self.proposal_generator(images, features, None)[0]

    def _images(self, samples: list[Sample]) -> ImageList:
        # Detectron2 annotates dicts; a Sample has the same item "image".
        images = self.preprocess_image(samples)  # pyrefly: ignore[bad-argument-type]
        return pad_to_square(images, self.square) if self.square else images

    @overload
    def inference(
        self,
        batched_inputs: Batch,
        detected_instances: list[Instances] | None = None,
        do_postprocess: Literal[True] = True,
    ) -> list[dict[str, Instances]]: ...

    @overload
    def inference(
        self, batched_inputs: Batch, detected_instances: list[Instances] | None = None, do_postprocess: bool = True
    ) -> list[dict[str, Instances]] | list[Instances]: ...

    def inference(
        self, batched_inputs: Batch, detected_instances: list[Instances] | None = None, do_postprocess: bool = True
    ) -> list[dict[str, Instances]] | list[Instances]:
        """Detect objects in a batch; see :class:`GeneralizedRCNN` for the arguments.

        Raises:
            UsageError: two parts compute secondary scores.
            NumericalError: a score or box is not finite.
        """
        samples = as_samples(batched_inputs)
        proposals: list[Instances] = []
        if detected_instances is None:
            images, features, proposals = self._propose(samples)
            results, _ = self.roi_heads(images, features, proposals, None, samples, self.parts)
        else:
            features = self.backbone(self._images(samples).tensor)
            given = [of_image.to(self.device) for of_image in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, given)
        if not do_postprocess:
            return results
        outputs = [
            {"instances": detector_postprocess(detections, *_output_size(sample, detections))}
            for detections, sample in zip(results, samples)
        ]
        if self.proposals_kept:
            for output, sample, of_image in zip(outputs, samples, proposals):
                output["proposals"] = _to_original_pixels(of_image[: self.proposals_kept], sample)
        return outputs


def _require_form_is_read(cfg):
    """Refuse a form of the FPN that Detectron2's backbones do not read.

    Raises:
        UsageError: MODEL.FPN.FORM with such a backbone.
    """
    name, form = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.FORM
    if form != "detectron2" and name not in ("build_resnet_pyramid_backbone", "build_clip_fpn_backbone"):
        raise UsageError(
            f"MODEL.FPN.FORM is {form!r}, which {name} does not read: set MODEL.BACKBONE.NAME to "
            'build_resnet_pyramid_backbone or build_clip_fpn_backbone, or the form to "detectron2".'
        )


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Generator[None, None, None]:
    """Evaluation mode inside the ``with`` block; restores the mode of every submodule after it."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes:
            submodule.training = mode


def _output_size(sample: Sample, instances: Instances) -> tuple[int, int]:
    """(height, width) of the original image, or else of the network's input."""
    height, width = instances.image_size
    return sample.height or height, sample.width or width


def _to_original_pixels(proposals: Instances, sample: Sample) -> Instances:
    """Proposals of one image, scaled from the network's input to the original image."""
    height, width = proposals.image_size
    out_height, out_width = _output_size(sample, proposals)
    boxes = Boxes(proposals.proposal_boxes.tensor.clone())
    boxes.scale(out_width / width, out_height / height)
    return Instances((out_height, out_width), proposal_boxes=boxes, objectness_logits=proposals.objectness_logits)
