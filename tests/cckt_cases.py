"""Small detectors with CCKT-Det's additions, and what their records carry beside images."""

import torch
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from tests import micro
from tests.test_detr_build import model_of

ON = ["MODEL.CCKT.ENABLED", "True", "MODEL.DETR.DROPOUT", "0.0"]


def model(*overrides, words=None):
    """An OpenVocabularyDeformableDETR of two decoder layers, 10 queries and random weights of one seed."""
    result = model_of(*ON, *overrides)
    if result.cckt.class_crops is not None:
        words_known = len(result.vocabulary.training_embeddings)
        crops = F.normalize(micro.wave((words_known, 2, result.vocabulary.embeddings.shape[1]), 0.7), dim=2)
        result.cckt.class_crops.fill(crops.half(), torch.full((words_known,), 2))
    if words is not None:
        result.vocabulary.set(words)
    return result


def records(count=2, words=((4, 1), (0,)), objects=None):
    """Micro records with prior words and embeddings of their objects; the second object of each has none.

    Args:
        count: images.
        words: of each image, in turn.
        objects: how many each image has, at most 2; None: both.
    """
    found = micro.images(count)
    for index, record in enumerate(found):
        record["file_name"] = f"{index}.jpg"
        record["prior_words"] = torch.tensor(words[index % len(words)], dtype=torch.int64)
        instances = record["instances"][: 2 if objects is None else objects[index]]
        instances.gt_embeddings = F.normalize(micro.wave((2, 8), 0.53 + index), dim=1).half()[: len(instances)]
        instances.gt_embedded = torch.tensor([True, False])[: len(instances)]
        record["instances"] = instances
    return found


def instances(boxes, classes, size=(60, 100)):
    return Instances(size, gt_boxes=Boxes(torch.tensor(boxes)), gt_classes=torch.tensor(classes))
