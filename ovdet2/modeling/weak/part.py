"""The part of a detector that learns from images without boxes: any number of terms on one pass of the box head.

Shapes: R regions, D embedding dimension. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from ovdet2.data.samples import CAPTIONS, IMAGE_LABELS
from ovdet2.data.steps.texts import AttachTexts, ImageTexts
from ovdet2.errors import UsageError
from ovdet2.modeling.rcnn.part import RCNNPart, WeakBatch
from ovdet2.modeling.weak.samplers import RegionSampler
from ovdet2.modeling.weak.text_batch import RegionSet, TextBatch

if TYPE_CHECKING:
    from ovdet2.data.sources import TrainSource


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

    def __init__(
        self,
        terms: Mapping[str, Term],
        kind: type[ImageTexts],
        embed: Callable[[Sequence[str]], Tensor] | None = None,
    ) -> None:
        """
        Args:
            terms: by the name of the loss, which begins with "loss_".
            kind: class of the texts that a step attaches.
            embed: function of K names of concepts that gives their unit embeddings [K, D]; None: no term has a table.
        """
        super().__init__({name: term.weight for name, term in terms.items()})
        self.terms = nn.ModuleDict({name: term.loss for name, term in terms.items()})
        self.samplers = {name: term.sampler for name, term in terms.items()}
        self.kind = kind
        self._embed = embed

    def prepare_training(self, sources: Sequence[TrainSource]) -> None:
        """Give the terms with a ``table`` the embeddings of the concepts that the steps find in captions.

        Raises:
            UsageError: no source has the step of this part, or two find other concepts.
        """
        tabled = [loss for loss in self.terms.values() if hasattr(loss, "table")]
        steps = [step for source in sources for step in source.steps if isinstance(step, AttachTexts)]
        steps = [step for step in steps if step.kind is self.kind]
        if not steps:
            raise UsageError(
                f"{self.name} learns from captions or image labels, but no source has any: name one in DATASETS.SOURCES, "
                f"or set the weights of {self.name} to 0."
            )
        if not tabled:
            return
        lists = {tuple(of[0] for of in step.matcher.names) for step in steps if step.matcher is not None}
        if len(lists) != 1 or self._embed is None:
            raise UsageError(f"the sources of {self.name} have {len(lists)} lists of concepts: give them one list.")
        table = self._embed(list(lists.pop())).float()
        for loss in tabled:
            loss.table = table

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
