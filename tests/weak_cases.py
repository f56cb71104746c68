"""Images without boxes, their proposals and texts, and a detector with losses on them, for tests."""

import torch
from detectron2.structures import Boxes, Instances

from ovdet2.data.samples import CAPTIONS, as_samples
from ovdet2.data.steps.texts import ImageTexts, SubImage
from ovdet2.modeling.weak import TextBatch
from tests import micro

FULL = (0.0, 0.0, 96.0, 64.0)


def unit(rows, seed=0):
    """Tensor [rows, 8], random unit rows."""
    values = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=1)


def proposals(count=12, seed=0, size=(64, 96)):
    """Instances of one image, best first."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([size[1] * 0.7, size[0] * 0.7])
    sides = 2 + torch.rand(count, 2, generator=generator) * torch.tensor([size[1] * 0.28, size[0] * 0.28])
    logits = torch.linspace(4, -2, count) if count else torch.zeros(0)
    boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    return Instances(size, proposal_boxes=boxes, objectness_logits=logits)


def cell(image_id, tags=(), captions=1, box=FULL):
    """A sub-image; its captions depend on its id."""
    return SubImage(box, image_id, unit(captions, image_id), tuple(tags))


def texts(*cells):
    """A batch of images with one sub-image each."""
    return TextBatch.of_cells([[of_image] for of_image in cells])


def captioned(kind=ImageTexts, tags=((0, 3), (4,))):
    """Samples without boxes, with texts attached."""
    samples = as_samples(micro.images(2 * len(tags))[::2])
    for number, (sample, of_image) in enumerate(zip(samples, tags)):
        sample.kind, sample.instances, sample.captions = CAPTIONS, None, ("a red star",)
        height, width = sample.image.shape[1:]
        box = (0.0, 0.0, float(width), float(height))
        sample.attach(kind((cell(100 + number, of_image, box=box),)))
    return samples
