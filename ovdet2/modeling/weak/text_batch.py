"""Texts of a batch of images without boxes, and the regions that are compared with them.

Shapes: N images, S sub-images, T captions, R regions, G sub-images of a region, D embedding dimension.
Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ovdet2.data.samples import Sample
from ovdet2.data.steps.texts import ImageTexts, SubImage


@dataclass(frozen=True)
class TextBatch:
    """The sub-images of a batch with their texts. An ordinary image is one sub-image, a mosaic has one for each cell.

    Attributes:
        boxes_xyxy: Tensor [S, 4], pixels of the network's input.
        image_of: Tensor [S] int64, ascending: the image of the batch that the sub-image lies in.
        ids: Tensor [S] int64, image ids of the data set. Equal ids: the same image.
        captions: Tensor [T, D] float32, unit rows.
        caption_of: Tensor [T] int64, ascending: the sub-image of the caption.
        tags: S Tensors int64, indices of concepts.
    """

    boxes_xyxy: Tensor
    image_of: Tensor
    ids: Tensor
    captions: Tensor
    caption_of: Tensor
    tags: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def caption_ids(self) -> Tensor:
        """Tensor [T] int64: the image id of each caption."""
        return self.ids[self.caption_of]

    def tag_targets(self, concepts: int) -> Tensor:
        """Tensor [S, K] bool: True where a sub-image has the tag; ``concepts`` is K."""
        targets = torch.zeros(len(self), concepts, dtype=torch.bool, device=self.ids.device)
        for row, tags in enumerate(self.tags):
            targets[row, tags] = True
        return targets

    @classmethod
    def of(cls, samples: Sequence[Sample], kind: type[ImageTexts], device: torch.device | str = "cpu") -> TextBatch:
        """The texts that a step has attached to N samples as ``kind``.

        Raises:
            UsageError: a sample has none.
        """
        return cls.of_cells([sample.attached(kind).cells for sample in samples], device)

    @classmethod
    def of_cells(cls, cells: Sequence[Sequence[SubImage]], device: torch.device | str = "cpu") -> TextBatch:
        """From the sub-images of each of N images."""
        flat = [cell for of_image in cells for cell in of_image]
        counts = [len(cell.captions) for cell in flat]
        rows = [cell.captions for cell in flat if len(cell.captions)]
        return cls(
            torch.tensor([cell.box_xyxy for cell in flat], device=device).view(-1, 4),
            _numbers([image for image, of_image in enumerate(cells) for _ in of_image], device),
            _numbers([cell.image_id for cell in flat], device),
            torch.cat(rows).to(device) if rows else torch.zeros(0, 0, device=device),
            _numbers([place for place, count in enumerate(counts) for _ in range(count)], device),
            tuple(_numbers(cell.tags, device) for cell in flat),
        )


def _numbers(values, device):
    return torch.tensor(list(values), dtype=torch.int64, device=device)


@dataclass(frozen=True)
class RegionSet:
    """Regions of a batch of images, chosen by a sampler.

    Attributes:
        boxes_xyxy: Tensor [R, 4], pixels of the network's input.
        image_of: Tensor [R] int64: the image of the batch.
        cells: Tensor [R, G] int64: sub-images (rows of the TextBatch) whose texts describe the region, -1 for none.
        group_of: Tensor [R] int64: regions of a bag, or of images that share a concept, have one number.
    """

    boxes_xyxy: Tensor
    image_of: Tensor
    cells: Tensor
    group_of: Tensor

    def __len__(self) -> int:
        return len(self.image_of)

    def members(self, sub_images: int) -> Tensor:
        """Tensor [R, S] bool: whether a sub-image describes a region; ``sub_images`` is S."""
        numbers = torch.arange(sub_images, device=self.cells.device)
        return (self.cells[:, :, None] == numbers).any(dim=1)

    @classmethod
    def of_cells(cls, texts: TextBatch, cell_of: Tensor, boxes_xyxy: Tensor) -> RegionSet:
        """Regions that one sub-image describes each, grouped by it.

        Args:
            texts: the batch.
            cell_of: Tensor [R] int64, the sub-image of each region.
            boxes_xyxy: Tensor [R, 4].
        """
        return cls(boxes_xyxy, texts.image_of[cell_of], cell_of[:, None], cell_of)
