"""Made-up batches for the tests of the query-based detectors."""

import math
from dataclasses import replace

import torch
from detectron2.structures import Boxes, Instances

from ovdet2.data.samples import Sample
from ovdet2.modeling.detr.memory import Memory
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.part import DetrStep
from ovdet2.modeling.detr.targets import Targets

SHAPES, STRIDES, CHANNELS = ((12, 16), (6, 8)), (8, 16), 5
SIZES = ((96, 128), (67, 76))  # pixels of the images in a batch of 96 x 128
VALID = [[[math.ceil(side / stride) for side in size] for stride in STRIDES] for size in SIZES]  # rows, columns


def samples(counts, words=5, seed=0, height=60, width=100):
    """Samples with ``counts`` objects each, of different boxes and labels below ``words``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, count in enumerate(counts):
        instances = Instances((height, width))
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        side = (0.1 + 0.3 * torch.rand(count, 2, generator=generator)) * torch.tensor([width, height])
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.randint(words, (count,), generator=generator)
        made.append(Sample(file_name=f"{index}.jpg", image_id=10 + index, instances=instances))
    return made


def targets(counts, words=5, seed=0, device="cpu"):
    """:class:`Targets` of :func:`samples`."""
    return Targets.of_samples(samples(counts, words, seed), device)


def outputs(layers, images, queries, words=5, seed=1, dtype=torch.float32):
    """Outputs with random logits and boxes within the image; states without channels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, images, queries)
    boxes = 0.1 + 0.8 * torch.rand(*shape, 4, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(*shape, words, generator=generator, dtype=torch.float64)
    return DetrOutputs(logits.to(dtype), boxes.to(dtype), torch.zeros(*shape, 0, dtype=dtype))


def changed(found, change):
    """:func:`outputs` with each Tensor [L, B, N, ...] changed by a function."""
    parts = {name: change(getattr(found, name)) for name in ("pred_logits", "pred_boxes", "hidden")}
    return replace(found, **parts, added={name: change(value) for name, value in found.added.items()})


def only(found, image):
    """The part of :func:`outputs` that belongs to one image."""
    return changed(found, lambda value: value[:, image : image + 1])


def step(made, queries=None, memory=None, network=None, criterion=None):
    """A :class:`DetrStep` of samples, with what a test needs."""
    return DetrStep(made, Targets.of_samples(made, "cpu"), memory, queries, network, criterion)


def memory(seed=0, padding=None):
    """Two images, of which the second is padded, with random tokens; those of the padding may be given."""
    generator = torch.Generator().manual_seed(seed)
    tokens, masks = [], []
    for level, (height, width) in enumerate(SHAPES):
        mask = torch.zeros(2, height, width, dtype=torch.bool)
        for image in range(2):
            rows, columns = VALID[image][level]
            mask[image, rows:], mask[image, :, columns:] = True, True
        tokens.append(torch.randn(2, height * width, CHANNELS, generator=generator, dtype=torch.float64))
        masks.append(mask.flatten(1))
    tokens, masks = torch.cat(tokens, dim=1), torch.cat(masks, dim=1)
    if padding is not None:
        tokens = tokens.masked_fill(masks[..., None], padding)
    sizes = torch.tensor(SHAPES, dtype=torch.float64)
    return Memory(tokens, SHAPES, masks, (torch.tensor(VALID) / sizes).flip(2))
