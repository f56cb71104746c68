"""RoI heads of "CLIP on cropped regions" with the boxes of a published closed-set Faster or Mask R-CNN of Detectron2.

Shapes: R proposals, C closed classes, K words.
Names: ``pred_`` predicted, ``_probs`` probabilities in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import nms

from ovdet2.data.samples import Sample
from ovdet2.errors import UsageError
from ovdet2.layers import class_wise_nms
from ovdet2.methods.vild.crop_scorer import CropScorer
from ovdet2.modeling.build import build_teacher
from ovdet2.modeling.rcnn.output_layers import require_finite
from ovdet2.modeling.rcnn.part import RCNNPart
from ovdet2.vocabulary.bank import WordBank

if TYPE_CHECKING:
    from ovdet2.vlm.teacher import Teacher


class CropWords(nn.Module):
    """The words of a detector without a classifier: CLIP compares crops with them.

    Attributes:
        vocabulary: the word bank.
        per_word: False: the score of a word depends on the others, since the scores of a crop are a softmax.
    """

    per_word = False

    def __init__(self, vocabulary: WordBank) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    @property
    def num_training_classes(self) -> int:
        """K."""
        return len(self.vocabulary)


@ROI_HEADS_REGISTRY.register()
class CropROIHeads(StandardROIHeads):
    """The closed-set box head refines the proposals, and CLIP classifies their crops.

    The score of a word is ``sqrt(o * p)``: o the probability that the box head gives to all its classes together, p CLIP's
    softmax over the words. The boxes are those of :func:`best_class_boxes`, after NMS without regard to classes.

    Attributes:
        classifier: the words, see :class:`CropWords`.
    """

    @configurable
    def __init__(
        self, *, words: CropWords, load_teacher: Callable[[], Teacher], input_format: str, crops: int, **kwargs: Any
    ) -> None:
        """
        Args:
            words: of the detector.
            load_teacher: gives the CLIP, whose weights are read when the first image is predicted.
            input_format: "RGB" or "BGR", of the network's input.
            crops: number of boxes of an image that are cropped.
            kwargs: as of :class:`StandardROIHeads`.
        """
        super().__init__(**kwargs)
        self.classifier = words
        self.load_teacher = load_teacher
        self.input_format = input_format
        self.crops = crops

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], vocabulary: WordBank
    ) -> dict[str, Any]:
        """Arguments from a configuration, with the word bank of the detector."""
        arguments: dict[str, Any] = super().from_config(cfg, input_shape)
        return arguments | {
            "words": CropWords(vocabulary),
            "load_teacher": partial(build_teacher, cfg),
            "input_format": cfg.INPUT.FORMAT,
            "crops": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @cached_property
    def _scorer(self) -> CropScorer:
        return CropScorer(self.load_teacher(), self.classifier.vocabulary, self.input_format)

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
        samples: Sequence[Sample] = (),
        parts: Sequence[RCNNPart] = (),
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Detections of each image.

        Args:
            images: not used.
            features: maps of the backbone by name.
            proposals: ``proposal_boxes`` of the RPN.
            targets, parts: not used.
            samples: of the images; their ``image`` is cropped.

        Returns:
            (detections, {}).

        Raises:
            UsageError: in training.
            NumericalError: a score or box is not finite.
            SetupError: CLIP's weights cannot be downloaded.
        """
        if self.training:
            raise UsageError("the boxes are those of a published detector, and CLIP is frozen: there is no training.")
        levels = [features[name].float() for name in self.box_in_features]
        pooled = self.box_pooler(levels, [of_image.proposal_boxes for of_image in proposals])
        predictor: Any = self.box_predictor  # Detectron2 annotates it as nn.Module
        predictions = predictor(self.box_head(pooled))
        boxes, probs = (of(predictions, proposals) for of in (predictor.predict_boxes, predictor.predict_probs))
        return [self._detect(*of_image) for of_image in zip(samples, proposals, boxes, probs, strict=True)], {}

    def _detect(self, sample: Sample, proposals: Instances, class_boxes: Tensor, probs: Tensor) -> Instances:
        """Detections of an image; ``class_boxes`` [R, 4 C] and ``probs`` [R, C + 1] of its proposals."""
        require_finite(class_boxes, probs)
        refined, objectness = best_class_boxes(class_boxes, probs)
        clipped = Boxes(refined)
        clipped.clip(proposals.image_size)
        predictor: Any = self.box_predictor
        solid = clipped.nonempty().nonzero().flatten()
        kept = solid[nms(clipped.tensor[solid], objectness[solid], predictor.test_nms_thresh)[: self.crops]]
        boxes, bank = clipped.tensor[kept], self.classifier.vocabulary
        scores = (objectness[kept, None] * self._scorer(sample.image, boxes)).sqrt()
        limits = predictor.test_score_thresh, predictor.test_nms_thresh, predictor.test_topk_per_image
        regions, classes = class_wise_nms(boxes, scores[:, : bank.num_detectable], *limits)
        return Instances(
            proposals.image_size,
            pred_boxes=Boxes(boxes[regions]),
            scores=scores[regions, classes],
            pred_classes=classes,
        )


def best_class_boxes(class_boxes: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """One box of each proposal from a regressor with a box for each class.

    Args:
        class_boxes: Tensor [R, 4 C], XYXY.
        probs: Tensor [R, C + 1], background last.

    Returns:
        (Tensor [R, 4], the box of the class with the highest probability; Tensor [R], 1 minus the probability of the
        background).
    """
    boxes = class_boxes.view(len(class_boxes), class_boxes.shape[1] // 4, 4)
    best = probs[:, :-1].argmax(dim=1)
    return boxes[torch.arange(len(boxes), device=boxes.device), best], 1 - probs[:, -1]
