"""Region samplers: which boxes of an image without boxes are compared with its texts.

A sampler is a callable ``(proposals, texts) -> RegionSet``. Proposals are :class:`Instances` of each image with
``proposal_boxes`` in pixels of the network's input and ``objectness_logits``, best first. Random numbers are drawn from
torch's global generator, whose state is in the checkpoints.

Shapes: N images, S sub-images, R regions, P proposals of an image.
Names: ``_logits`` before softmax or sigmoid, ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import nms

from ovdet2.modeling.weak.text_batch import RegionSet, TextBatch

MIN_INSIDE = 0.3  # share of a proposal that must lie in its sub-image (CLIM)
Proposals = Sequence[Instances]


class RegionSampler(Protocol):
    """See the module."""

    def __call__(self, proposals: Proposals, texts: TextBatch, /) -> RegionSet: ...


def assign_to_cells(boxes_xyxy: Tensor, cells_xyxy: Tensor) -> Tensor:
    """The cell of an image that each box belongs to.

    Args:
        boxes_xyxy: Tensor [P, 4].
        cells_xyxy: Tensor [C, 4].

    Returns:
        Tensor [P] int64: the cell that holds the largest share of the box's area, -1 if that is at most 0.3.
    """
    if not len(boxes_xyxy) or not len(cells_xyxy):
        return torch.full((len(boxes_xyxy),), -1, dtype=torch.int64, device=boxes_xyxy.device)
    corners = torch.maximum(boxes_xyxy[:, None, :2], cells_xyxy[:, :2])
    sides = (torch.minimum(boxes_xyxy[:, None, 2:], cells_xyxy[:, 2:]) - corners).clamp(min=0)
    shares, best = (sides.prod(dim=2) / areas(boxes_xyxy).clamp(min=1e-6)[:, None]).max(dim=1)
    return torch.where(shares > MIN_INSIDE, best, -1)


def areas(boxes_xyxy: Tensor) -> Tensor:
    """Tensor [..., 4] -> [...]."""
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(dim=-1)


def clipped(boxes_xyxy: Tensor, frame_xyxy: Tensor) -> Tensor:
    """Boxes [P, 4], cut to the frame [4]."""
    lower, upper = frame_xyxy[:2].repeat(2), frame_xyxy[2:].repeat(2)
    return boxes_xyxy.clamp(min=lower, max=upper)


def best_of_cells(proposals: Proposals, texts: TextBatch, topk: int) -> list[Tensor]:
    """For each of the S sub-images, its at most ``topk`` best proposals, cut to it: Tensors [P, 4], best first."""
    found: list[Tensor] = []
    for image, of_image in enumerate(proposals):
        cells = texts.boxes_xyxy[texts.image_of == image]
        boxes = of_image.proposal_boxes.tensor.to(cells)
        places = assign_to_cells(boxes, cells)
        found += [clipped(boxes[places == place][:topk], cell) for place, cell in enumerate(cells)]
    return found


def _joined(texts: TextBatch, boxes_of_cells: Sequence[Tensor]) -> RegionSet:
    counts = torch.tensor([len(boxes) for boxes in boxes_of_cells], dtype=torch.int64, device=texts.ids.device)
    cell_of = torch.arange(len(texts), device=texts.ids.device).repeat_interleave(counts)
    boxes = torch.cat(list(boxes_of_cells)) if boxes_of_cells else texts.boxes_xyxy[:0]
    return RegionSet.of_cells(texts, cell_of, boxes)


@dataclass(frozen=True)
class WholeImage:
    """Each sub-image is a region (Detic's captions)."""

    def __call__(self, proposals: Proposals, texts: TextBatch, /) -> RegionSet:
        """S regions."""
        return RegionSet.of_cells(texts, torch.arange(len(texts), device=texts.ids.device), texts.boxes_xyxy)


@dataclass(frozen=True)
class MaxSize:
    """Of the best proposals of each sub-image the one of largest area (Detic, Eq. 4).

    Attributes:
        topk: proposals that are considered, by objectness. Without one the region is the sub-image.
    """

    topk: int

    def __call__(self, proposals: Proposals, texts: TextBatch, /) -> RegionSet:
        """S regions."""
        largest = [
            boxes[areas(boxes).argmax()] if len(boxes) else cell
            for boxes, cell in zip(best_of_cells(proposals, texts, self.topk), texts.boxes_xyxy, strict=True)
        ]
        boxes = torch.stack(largest) if largest else texts.boxes_xyxy
        return RegionSet.of_cells(texts, torch.arange(len(texts), device=texts.ids.device), boxes)


@dataclass(frozen=True)
class TopK:
    """The best proposals of each sub-image (VLDet).

    Attributes:
        topk: proposals of a sub-image at most.
    """

    topk: int

    def __call__(self, proposals: Proposals, texts: TextBatch, /) -> RegionSet:
        """Between 0 and S x topk regions."""
        return _joined(texts, best_of_cells(proposals, texts, self.topk))


@dataclass(frozen=True)
class RandomRegions:
    """Random proposals of each sub-image, in their order (RegionCLIP).

    Attributes:
        count: proposals of a sub-image at most.
        topk: drawn from these, by objectness.
    """

    count: int
    topk: int = 300

    def __call__(self, proposals: Proposals, texts: TextBatch, /) -> RegionSet:
        """Between 0 and S x count regions."""
        best = best_of_cells(proposals, texts, self.topk)
        drawn = [boxes[torch.randperm(len(boxes))[: self.count].sort().values.to(boxes.device)] for boxes in best]
        return _joined(texts, drawn)


@dataclass(frozen=True)
class ConceptGroup:
    """The best proposals of sub-images that share a concept (CoDet).

    Runs of ``size`` sub-images form a group, as a concept sampler draws them; a run without a common tag is dropped, and
    so is an incomplete last one. ``group_of`` numbers the runs.

    Attributes:
        topk: proposals of a sub-image at most.
        size: sub-images of a group.
    """

    topk: int
    size: int

    def __call__(self, proposals: Proposals, texts: TextBatch, /) -> RegionSet:
        """Between 0 and S x topk regions; ``cells`` is the sub-image of each."""
        every = _joined(texts, best_of_cells(proposals, texts, self.topk))
        groups = every.cells[:, 0] // self.size
        keep = torch.zeros(len(every), dtype=torch.bool, device=groups.device)
        for group in range(len(texts) // self.size):
            if common_tags(texts, range(group * self.size, (group + 1) * self.size)):
                keep |= groups == group
        return RegionSet(every.boxes_xyxy[keep], every.image_of[keep], every.cells[keep], groups[keep])


def common_tags(texts: TextBatch, cells: Sequence[int]) -> list[int]:
    """Concepts that all of some sub-images have, ascending."""
    return sorted(set.intersection(*(set(texts.tags[cell].tolist()) for cell in cells)))


@dataclass(frozen=True)
class NeighbourhoodBags:
    """Bags of boxes around proposals: 3 x 3 boxes of one size, some of which are dropped (BARON).

    A seed is one of the best proposals with an aspect ratio in (1/4, 4), more than 1% of the image and an objectness
    above ``min_objectness``; the best one if there is none. NMS leaves seeds that hardly overlap. ``group_of`` numbers the
    bags. The regions have no texts: ``cells`` is -1, and the bag is compared with an embedding of its hull.

    Attributes:
        topk: proposals that are considered, by objectness.
        bags: bags of a seed; equal ones count once.
        min_objectness: probability.
        nms: IoU of the seeds' NMS.
        spacing: distance of neighbours as a share of the seed's side; below 0 they overlap.
        keep: highest probability that the neighbour at a side is in a bag.
    """

    topk: int = 300
    bags: int = 3
    min_objectness: float = 0.85
    nms: float = 0.1
    spacing: float = -0.1
    keep: float = 0.3

    def __call__(self, proposals: Proposals, texts: TextBatch, /) -> RegionSet:
        """Each bag has 1 to 9 regions inside its image."""
        boxes, images, groups, number = [], [], [], 0
        for image, of_image in enumerate(proposals):
            for seed in self._seeds(of_image):
                for mask in self._masks(seed, of_image.image_size):
                    bag = clipped(neighbours(seed, self.spacing)[mask], _frame(of_image.image_size, seed))
                    boxes.append(bag)
                    images += [image] * len(bag)
                    groups += [number] * len(bag)
                    number += 1
        device = texts.ids.device
        joined = torch.cat(boxes) if boxes else texts.boxes_xyxy[:0]
        of = [torch.tensor(values, dtype=torch.int64, device=device) for values in (images, groups)]
        return RegionSet(joined, of[0], torch.full((len(joined), 1), -1, device=device), of[1])

    def _seeds(self, proposals: Instances) -> Tensor:
        boxes = proposals.proposal_boxes.tensor[: self.topk]
        scores = proposals.objectness_logits[: self.topk].float().sigmoid()
        sides, (height, width) = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6), proposals.image_size
        ratios = sides[:, 0] / sides[:, 1]
        good = (ratios > 0.25) & (ratios < 4) & (areas(boxes) > 0.01 * height * width) & (scores > self.min_objectness)
        chosen = torch.nonzero(good).flatten() if good.any() else torch.arange(min(1, len(boxes)), device=boxes.device)
        return boxes[chosen[nms(boxes[chosen], scores[chosen], self.nms)]]

    def _masks(self, seed: Tensor, image_size: tuple[int, int]) -> list[Tensor]:
        """Distinct masks [9] bool of the boxes of a bag; the seed, number 4, is in each."""
        chances, masks = neighbour_chances(seed, image_size, self.spacing, self.keep), []
        for _ in range(self.bags):
            mask = torch.rand(9).to(chances) < chances
            if not any(torch.equal(mask, other) for other in masks):
                masks.append(mask)
        return masks


def neighbours(seed_xyxy: Tensor, spacing: float) -> Tensor:
    """The 3 x 3 boxes around a box [4], row by row, number 4 is the box: Tensor [9, 4]."""
    steps = (seed_xyxy[2:] - seed_xyxy[:2]) * (1 + spacing)
    places = torch.tensor([-1.0, 0.0, 1.0]).to(seed_xyxy)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    shifts = torch.stack([columns.flatten() * steps[0], rows.flatten() * steps[1]], dim=1)
    return seed_xyxy + shifts.repeat(1, 2)


def neighbour_chances(seed_xyxy: Tensor, image_size: tuple[int, int], spacing: float, keep: float) -> Tensor:
    """Probability that each of the :func:`neighbours` is in a bag: Tensor [9].

    At the left and right ``min(keep, (h / w)^3 keep)``, above and below ``min(keep, (w / h)^3 keep)``, so that hulls tend
    to be square; 0 where less than a share ``keep + spacing`` of a box fits between the seed and the border. A corner has
    the geometric mean of its two sides.

    Args:
        seed_xyxy: Tensor [4], in the image.
        image_size: (height, width).
        spacing, keep: see :class:`NeighbourhoodBags`.
    """
    left, top, right, bottom = seed_xyxy.double().unbind()
    width, height = (right - left).clamp(min=1e-6), (bottom - top).clamp(min=1e-6)
    across, upright = ((height / width) ** 3 * keep).clamp(max=keep), ((width / height) ** 3 * keep).clamp(max=keep)
    least = keep + spacing
    west = across * (left / width >= least)
    east = across * ((image_size[1] - right) / width >= least)
    north = upright * (top / height >= least)
    south = upright * ((image_size[0] - bottom) / height >= least)
    one = torch.ones_like(west)
    corners = [(side * pole).sqrt() for pole in (north, south) for side in (west, east)]
    return torch.stack([corners[0], north, corners[1], west, one, east, corners[2], south, corners[3]])


def _frame(image_size: tuple[int, int], like: Tensor) -> Tensor:
    return torch.tensor([0, 0, image_size[1], image_size[0]]).to(like)
