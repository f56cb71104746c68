"""Region-word losses: callables ``(embeddings, regions, texts) -> scalar`` on the pure losses of this package.

Embeddings are Tensor [R, D], unit rows of the regions, from the detector's box head.

Shapes: R regions, S sub-images, K concepts, D embedding dimension. Names: ``_logits`` before softmax or sigmoid.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ovdet2.layers import CosineClassifier, cosine_logits
from ovdet2.modeling.weak.caption_queue import CaptionQueue
from ovdet2.modeling.weak.losses import caption_bce, hungarian_bce, tag_bce
from ovdet2.modeling.weak.text_batch import RegionSet, TextBatch


class RegionWordLoss(Protocol):
    """See the module."""

    def __call__(self, embeddings: Tensor, regions: RegionSet, texts: TextBatch, /) -> Tensor: ...


class TextLogits(nn.Module):
    """``cos / tau + b`` with the temperature of the detector's classifier, and its bias or another that only this loss has.

    Attributes:
        bias: learned b of this loss; None: that of the classifier, if it has one.
    """

    def __init__(self, classifier: CosineClassifier, own_bias: float | None = None) -> None:
        """
        Args:
            classifier: stays a module of the detector.
            own_bias: initial value of a separate b; None: the classifier's.
        """
        super().__init__()
        self._classifier = (classifier,)
        self.bias = None if own_bias is None else nn.Parameter(torch.tensor(own_bias))

    def forward(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Unit rows [R, D] and [K, D] -> logits [R, K]."""
        (classifier,) = self._classifier
        bias = classifier.bias if self.bias is None else self.bias
        return cosine_logits(embeddings, rows, **classifier.factor(), bias=bias)


class TagLoss(nn.Module):
    """:func:`tag_bce` of regions and the tags of their sub-images, over the rows of a table of concepts."""

    def __init__(self, logits: TextLogits) -> None:
        super().__init__()
        self.logits = logits
        self.table: Tensor | None = None  # [K, D] unit rows: set before the first step

    def forward(self, embeddings: Tensor, regions: RegionSet, texts: TextBatch) -> Tensor:
        """See the module; 0 if no region has a tag."""
        assert self.table is not None, "set the table first"
        of_cells = texts.tag_targets(len(self.table))
        targets = (regions.members(len(texts)).float() @ of_cells.float()) > 0
        return tag_bce(self.logits(embeddings, self.table), targets)


class CaptionLoss(nn.Module):
    """:func:`caption_bce` of regions and captions: of this step in all processes, and of the queue.

    A caption is a positive of a region if it is of an image that the region shows, also if it comes from the queue or from
    another process: the same image is never a negative.
    """

    def __init__(self, logits: TextLogits, queue: CaptionQueue, negative_weight: float = 1.0) -> None:
        super().__init__()
        self.logits, self.queue, self.negative_weight = logits, queue, negative_weight

    def forward(self, embeddings: Tensor, regions: RegionSet, texts: TextBatch) -> Tensor:
        """See the module. A collective call. Regions whose images have no caption do not count."""
        rows, ids = self.queue.columns(texts.captions, texts.caption_ids)
        shown = regions.members(len(texts))  # [R, S]
        positive = (shown.float() @ (texts.ids[:, None] == ids).float()) > 0
        described = positive.any(dim=1)
        return caption_bce(self.logits(embeddings[described], rows), positive[described], self.negative_weight)


class NounLoss(nn.Module):
    """:func:`hungarian_bce` of the regions and nouns (tags) of each sub-image, averaged over the sub-images (VLDet).

    Negatives are the nouns of the other sub-images of this process, repeated ones included, except nouns of this one.
    """

    def __init__(self, logits: TextLogits) -> None:
        super().__init__()
        self.logits = logits
        self.table: Tensor | None = None  # [K, D] unit rows: set before the first step

    def forward(self, embeddings: Tensor, regions: RegionSet, texts: TextBatch) -> Tensor:
        """See the module; ``regions.group_of`` is the sub-image of each region."""
        assert self.table is not None, "set the table first"
        logits = self.logits(embeddings, self.table)
        total = logits.sum() * 0
        for cell, nouns in enumerate(texts.tags):
            others = [tags for place, tags in enumerate(texts.tags) if place != cell]
            other = torch.cat(others) if others else nouns[:0]
            other = other[~torch.isin(other, nouns)]
            rows = logits[regions.group_of == cell]
            total = total + hungarian_bce(rows[:, nouns], rows[:, other])
        return total / max(len(texts), 1)
