"""What a query-based detector is trained on, and which query answers for which object.

Shapes: B images, M objects over all images, X the most objects of one image, P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ovdet2.data.samples import Sample
from ovdet2.modeling.detr.boxes import xyxy_to_cxcywh


@dataclass(frozen=True)
class Targets:
    """The objects of a batch, those of the first image first.

    Args:
        labels: Tensor [M] int64, 0..K-1.
        boxes_cxcywh: Tensor [M, 4] float32, normalised by the size of the image without its padding.
        counts: tuple of B ints, the objects of each image.
        names: tuple of B strings, what messages call the images.
        label_limit: 1 + the highest label, 0 without objects; known to the host without asking the device.
        image_sizes: tuple of B (height, width) in pixels, without padding.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    counts: tuple[int, ...]
    names: tuple[str, ...]
    label_limit: int
    image_sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of_samples(cls, samples: Sequence[Sample], device: torch.device | str) -> Targets:
        """
        Args:
            samples: B samples with ``instances`` on the CPU; the loading has left out crowds and boxes that were
                cropped away.
            device: of the tensors.

        Raises:
            KeyError: a sample without instances.
        """
        labels, boxes, sizes = [], [], []
        for sample in samples:
            instances = sample["instances"]
            height, width = instances.image_size
            size = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes.append(xyxy_to_cxcywh(instances.gt_boxes.tensor / size))
            labels.append(instances.gt_classes)
            sizes.append((height, width))
        highest = max((int(found.max()) for found in labels if len(found)), default=-1)
        return cls(
            torch.cat(labels).to(device, non_blocking=True),
            torch.cat(boxes).to(device, non_blocking=True),
            tuple(len(found) for found in labels),
            tuple(sample.name for sample in samples),
            highest + 1,
            tuple(sizes),
        )

    def without_labels(self) -> Targets:
        """The same objects under the one label 0, for a class-agnostic head."""
        return replace(self, labels=torch.zeros_like(self.labels), label_limit=min(1, len(self)))

    def padded(self, rows: Tensor) -> Tensor:
        """Rows of the objects, [M, ...], as [B, X, ...], filled up with zeros."""
        return pad_sequence(list(rows.split(self.counts)), batch_first=True)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Matches:
    """Pairs of a query and the object it answers for; a query without a pair is background.

    Args:
        image: Tensor [P] int64, 0..B-1.
        query: Tensor [P] int64, 0..N-1, of that image.
        target: Tensor [P] int64, 0..M-1, row of the :class:`Targets`.
    """

    image: Tensor
    query: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.query)
