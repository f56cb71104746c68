"""Concept priors that the tests of their format, their sources and their tool share."""

import random

import torch

from ovdet2.data.datasets.coco_json import Split
from ovdet2.priors.concept_prior import ConceptPriors, PriorWriter
from ovdet2.priors.truth import Truth

WORDS = ("cat", "dog", "Red_Mug", "tree", "car")
TRUTH_SPLIT = Split("made up", base=((1, "cat"), (2, "dog"), (3, "tree")), novel=((7, "car"), (9, "boat")))


def write(path, lists, words=WORDS, missing=(), top=100, kind="prediction"):
    """A prior of {image id: {word index: score}}."""
    writer = PriorWriter(words, [*lists, *missing], top)
    for image_id, scores in lists.items():
        writer.add(image_id, torch.tensor(list(scores), dtype=torch.int64), torch.tensor(list(scores.values())))
    writer.save(path, "made_up", "0" * 64, {"backend": "test"}, kind)
    return ConceptPriors(path)


def made_truth(images, classes, seed=0):
    """Truth of 0 to 3 present classes an image."""
    rng = random.Random(seed)
    return {i: Truth(frozenset(rng.sample(range(classes), rng.randint(0, 3))), None) for i in range(1, images + 1)}
