"""Ground truth of a batch, and the pairs of matched queries and objects.

Shapes: B images, M objects over all images, X the most objects of one image, P pairs.
Names: ``gt_`` ground truth, ``_cxcywh`` boxes (centre x, centre y, width, height).
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
    """The ground-truth objects of a batch, in the order of the images.

    Args:
        labels: Tensor [M] int64, 0..K-1.
        boxes_cxcywh: Tensor [M, 4] float32, normalised by the size of the image without its padding.
        counts: tuple of B ints, the number of objects of each image.
        names: tuple of B strings, image names for messages.
        label_limit: 1 + the highest label, 0 without objects; an int, so that no GPU synchronisation is needed.
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
            samples: B samples with ``instances`` on the CPU; data loading has removed crowds and boxes outside the
                crop.
            device: device of the tensors.

        Raises:
            KeyError: a sample has no ``instances``.
        """
        labels, boxes, sizes = [], [], []
        for sample in samples:
            instances = sample["instances"]
            height, width = instances.image_size
            size = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes.append(xyxy_to_cxcywh(instances.gt_boxes.tensor / size))
            labels.append(instances.gt_classes)
            sizes.append((height, width))
        highest = max((int(of_image.max()) for of_image in labels if len(of_image)), default=-1)
        return cls(
            torch.cat(labels).to(device, non_blocking=True),
            torch.cat(boxes).to(device, non_blocking=True),
            tuple(len(of_image) for of_image in labels),
            tuple(sample.name for sample in samples),
            highest + 1,
            tuple(sizes),
        )

    def without_labels(self) -> Targets:
        """The same objects, all with label 0, for a class-agnostic head."""
        return replace(self, labels=torch.zeros_like(self.labels), label_limit=min(1, len(self)))

    def padded(self, rows: Tensor) -> Tensor:
        """Split rows of objects by image and pad with zeros: [M, ...] -> [B, X, ...]."""
        return pad_sequence(list(rows.split(self.counts)), batch_first=True)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Matches:
    """Matched pairs of queries and objects; a query without a pair is background.

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
