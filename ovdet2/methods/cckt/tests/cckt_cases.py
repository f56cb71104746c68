"""Small detectors with CCKT-Det's part, and what their samples carry beside images."""

import torch
from torch.nn import functional as F

from ovdet2.data.samples import Sample
from ovdet2.methods.cckt.sample import ObjectCrops, PresentWords
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


def samples(count=2, words=((4, 1), (0,)), objects=None):
    """Micro samples with present words and crops of their objects; the second object of each has none.

    Args:
        count: images.
        words: of each image, in turn.
        objects: how many each image has, at most 2; None: both.
    """
    made = [Sample.of(record) for record in micro.images(count)]
    for index, sample in enumerate(made):
        sample.file_name = f"{index}.jpg"
        sample.instances = sample.instances[: 2 if objects is None else objects[index]]
        kept = len(sample.instances)
        rows = F.normalize(micro.wave((2, 8), 0.53 + index), dim=1).half()
        sample.attach(ObjectCrops(rows[:kept], torch.tensor([True, False])[:kept]))
        sample.attach(PresentWords(torch.tensor(words[index % len(words)], dtype=torch.int64)))
    return made
