"""What a query-based detector is trained on, and which query answers for which object.

Shapes: B images, M objects over all images, X the most objects of one image, P pairs.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import pad_sequence

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
        embeddings: Tensor [M, D] float16, the teacher's of the objects' crops, unit rows where ``embedded``; or None.
        embedded: Tensor [M] bool, or None.
    """

    labels: torch.Tensor
    boxes_cxcywh: torch.Tensor
    counts: tuple
    names: tuple
    label_limit: int
    image_sizes: tuple
    embeddings: torch.Tensor | None = None
    embedded: torch.Tensor | None = None

    @classmethod
    def of_records(cls, records, device):
        """
        Args:
            records: B records as of the mapper: "instances" with ``gt_boxes`` (pixels of the augmented image) and
                ``gt_classes``, on the CPU, in all or in none of them also ``gt_embeddings`` and ``gt_embedded``. The
                mapper has left out crowds and boxes that were cropped away.
            device: where the tensors are wanted.
        """
        labels, boxes = [], []
        for record in records:
            height, width = record["instances"].image_size
            size = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes.append(xyxy_to_cxcywh(record["instances"].gt_boxes.tensor / size))
            labels.append(record["instances"].gt_classes)
        highest = max((int(found.max()) for found in labels if len(found)), default=-1)
        return cls(
            torch.cat(labels).to(device, non_blocking=True),
            torch.cat(boxes).to(device, non_blocking=True),
            tuple(len(found) for found in labels),
            tuple(image_name(record) for record in records),
            highest + 1,
            tuple(tuple(record["instances"].image_size) for record in records),
            *(_joined(records, name, device) for name in ("gt_embeddings", "gt_embedded")),
        )

    def without_labels(self):
        """The same objects under the one label 0, for a class-agnostic head."""
        return replace(self, labels=torch.zeros_like(self.labels), label_limit=min(1, len(self)))

    def padded(self, rows):
        """Rows of the objects, [M, ...], as [B, X, ...], filled up with zeros."""
        return pad_sequence(rows.split(self.counts), batch_first=True)

    def __len__(self):
        return len(self.labels)


@dataclass(frozen=True)
class Matches:
    """Pairs of a query and the object it answers for; a query without a pair is background.

    Args:
        image: Tensor [P] int64, 0..B-1.
        query: Tensor [P] int64, 0..N-1, of that image.
        target: Tensor [P] int64, 0..M-1, row of the :class:`Targets`.
    """

    image: torch.Tensor
    query: torch.Tensor
    target: torch.Tensor

    def __len__(self):
        return len(self.query)


def _joined(records, name, device):
    """A field of all instances, or None where they do not have it."""
    if not all(record["instances"].has(name) for record in records):
        return None
    with torch.autocast("cpu", enabled=False):  # which cannot join float16 rows, even to leave them as they are
        joined = torch.cat([record["instances"].get(name) for record in records])
    return joined.to(device, non_blocking=True)


def image_name(record):
    """What messages call the image of a record."""
    return f"{record.get('file_name')} (id {record.get('image_id')})"
