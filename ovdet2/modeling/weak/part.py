"""The part of a detector that learns from images without boxes: any number of terms on one pass of the box head.

Shapes: R regions, D embedding dimension. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from ovdet2.data.samples import CAPTIONS, IMAGE_LABELS
from ovdet2.data.steps.texts import ImageTexts
from ovdet2.modeling.rcnn.part import RCNNPart, WeakBatch
from ovdet2.modeling.weak.samplers import RegionSampler
from ovdet2.modeling.weak.text_batch import RegionSet, TextBatch


@dataclass(frozen=True)
class Term:
    """A loss on images without boxes.

    Attributes:
        weight: of the loss.
        sampler: chooses regions, see :mod:`ovdet2.modeling.weak.samplers`.
        loss: module that compares them with texts, see :mod:`ovdet2.modeling.weak.region_word`.
    """

    weight: float
    sampler: RegionSampler
    loss: nn.Module


class WeakPart(RCNNPart):
    """Losses by name, on captioned images and images with labels; for training only.

    Attributes:
        terms: the losses' modules by name, saved with the part.
    """

    sees = (CAPTIONS, IMAGE_LABELS)
    training_only = True

    def __init__(self, terms: Mapping[str, Term], kind: type[ImageTexts]) -> None:
        """
        Args:
            terms: by the name of the loss, which begins with "loss_".
            kind: class of the texts that a step attaches.
        """
        super().__init__({name: term.weight for name, term in terms.items()})
        self.terms = nn.ModuleDict({name: term.loss for name, term in terms.items()})
        self.samplers = {name: term.sampler for name, term in terms.items()}
        self.kind = kind

    def weak_losses(self, batch: WeakBatch) -> dict[str, Tensor]:
        """The unweighted losses.

        Raises:
            UsageError: a sample has no texts attached.
        """
        device = next(iter(batch.features.values())).device
        texts = TextBatch.of(batch.samples, self.kind, device)
        regions = {name: sampler(batch.proposals, texts) for name, sampler in self.samplers.items()}
        embeddings = embed_regions(batch, list(regions.values()))
        return {
            name: cast(Tensor, self.terms[name](rows, of_term, texts))
            for (name, of_term), rows in zip(regions.items(), embeddings, strict=True)
        }


def embed_regions(batch: WeakBatch, regions: Sequence[RegionSet]) -> list[Tensor]:
    """Region embeddings of several sets in one pass of the box head: a Tensor [R, D] for each set.

    If the head has batch normalisation, the sets share its statistics.
    """
    boxes = torch.cat([of_set.boxes_xyxy for of_set in regions])
    images = torch.cat([of_set.image_of for of_set in regions])
    order = torch.argsort(images, stable=True)
    counts = torch.bincount(images, minlength=len(batch.samples)).tolist()
    embeddings = batch.heads.embed_boxes(batch.features, [Boxes(part) for part in boxes[order].split(counts)])
    restored = embeddings[torch.argsort(order)]
    return list(restored.split([len(of_set) for of_set in regions]))
