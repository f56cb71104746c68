"""Detectors on random inputs, for benchmarks: the values of weights, words and pixels do not change the cost of a pass.

Shapes: H x W image, M objects, K words, D embedding dimension. Names: ``gt_`` ground truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn import functional as F

import ovdet2.modeling  # noqa: F401  registers the detectors
from ovdet2.data.samples import Sample
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary

DIM = 512


def random_words(
    names: Sequence[str], base_mask: Sequence[bool], dim: int = DIM, teacher: Fingerprint | None = None
) -> Vocabulary:
    """Words with random unit embeddings, the same for the same number of words."""
    rows = torch.randn(len(names), dim, generator=torch.Generator().manual_seed(len(names)))
    teacher = Fingerprint("synthetic", "none") if teacher is None else teacher
    return Vocabulary(tuple(names), torch.tensor(base_mask), F.normalize(rows, dim=1), teacher, "single")


def build_detector(cfg: CfgNode, words: Vocabulary) -> nn.Module:
    """The detector of a configuration for these words, on MODEL.DEVICE, with the random weights of seed 0."""
    torch.manual_seed(0)
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=words)
    return model.to(cfg.MODEL.DEVICE)


def noise_samples(size: tuple[int, int], batch: int = 1, objects: int = 20) -> list[Sample]:
    """Images of noise with boxes spread over them, a quarter of the image's sides; the class of the i-th is i."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    sides, samples = torch.tensor([width, height]), []
    for number in range(batch):
        target = Instances(size)
        corners = torch.rand(objects, 2, generator=generator) * 0.7 * sides
        target.gt_boxes = Boxes(torch.cat([corners, corners + 0.25 * sides], dim=1))
        target.gt_classes = torch.arange(objects)
        pixels = (torch.rand(3, height, width, generator=generator) * 255).to(torch.uint8)
        samples.append(Sample(image_id=number, height=height, width=width, image=pixels, instances=target))
    return samples


class TrainingStep:
    """Forward, backward and an update of size 0, so that all models compared keep equal weights."""

    def __init__(
        self, model: nn.Module, kind: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **options: Any
    ) -> None:
        """
        Args:
            model: put into training mode.
            kind: of the optimizer.
            options: of the optimizer.
        """
        self.model = model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = kind(trained, lr=0.0, **options)

    def __call__(self, samples: Sequence[Sample]) -> None:
        torch.manual_seed(0)  # the same proposals are sampled in all models
        with EventStorage():
            loss = cast(Tensor, sum(self.model(samples).values()))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
