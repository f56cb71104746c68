"""Made-up batches for the tests of the query-based detectors."""

import torch
from detectron2.structures import Boxes, Instances

from ovdet2.modeling.detr.targets import Targets


def records(counts, words=5, seed=0, height=60, width=100):
    """Mapper-like records with ``counts`` objects each, of different boxes and labels below ``words``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, count in enumerate(counts):
        instances = Instances((height, width))
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width * 0.6, height * 0.6])
        side = (0.1 + 0.3 * torch.rand(count, 2, generator=generator)) * torch.tensor([width, height])
        instances.gt_boxes = Boxes(torch.cat([corner, corner + side], dim=1))
        instances.gt_classes = torch.randint(words, (count,), generator=generator)
        made.append({"file_name": f"{index}.jpg", "image_id": 10 + index, "instances": instances})
    return made


def targets(counts, words=5, seed=0, device="cpu"):
    """:class:`Targets` of :func:`records`."""
    return Targets.of_records(records(counts, words, seed), device)


def outputs(layers, images, queries, words=5, seed=1, dtype=torch.float32):
    """What a network gives: random logits, boxes within the image."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, images, queries)
    boxes = 0.1 + 0.8 * torch.rand(*shape, 4, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(*shape, words, generator=generator, dtype=torch.float64)
    return {"pred_logits": logits.to(dtype), "pred_boxes": boxes.to(dtype)}


def only(found, image):
    """The part of :func:`outputs` that belongs to one image."""
    return {key: value[:, image : image + 1] for key, value in found.items()}
