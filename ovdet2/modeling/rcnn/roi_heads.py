"""Detectron2's StandardROIHeads with the open-vocabulary box predictor."""

from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import StandardROIHeads

from ovdet2.modeling.build import build_classifier
from ovdet2.modeling.rcnn.output_layers import OpenVocabularyOutputLayers


@ROI_HEADS_REGISTRY.register()
class OpenVocabularyROIHeads(StandardROIHeads):
    """Box head, class-agnostic regression, and a classifier over the vocabulary it is given.

    The label of background, and so the only class count, is read from the classifier.
    """

    @classmethod
    def from_config(cls, cfg, input_shape, vocabulary):
        arguments = super().from_config(cfg, input_shape)
        head_shape = arguments["box_head"].output_shape
        width = head_shape.channels * (head_shape.width or 1) * (head_shape.height or 1)
        classifier = build_classifier(cfg, width, vocabulary)
        arguments["num_classes"] = classifier.num_training_classes
        arguments["box_predictor"] = OpenVocabularyOutputLayers(cfg, head_shape, classifier)
        return arguments
