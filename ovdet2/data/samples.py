"""The sample: one image with its annotations, passed from reader to steps to model.

Shapes: H x W augmented image, M objects. Names: ``gt_`` ground truth.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances

from ovdet2.errors import UsageError

BOXES, CAPTIONS, IMAGE_LABELS = "boxes", "captions", "image_labels"
KINDS = (BOXES, CAPTIONS, IMAGE_LABELS)
Attachment = TypeVar("Attachment")


class Records(Protocol):
    """Detectron2 records by index: a list, or a sequence that makes them lazily."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass
class Sample:
    """One image with its annotations, on the way from a data set to the model.

    A reader fills the first group of fields. Steps (:mod:`ovdet2.data.steps`) fill the second. The model reads the
    result. A method defines a class for the data it adds: ``sample.attach(CachedRegions(...))`` in its step,
    ``sample.attached(CachedRegions)`` in its model part. Detectron2's code reads records by key, therefore
    ``sample["image"]``, ``sample.get("height", 0)`` and ``"instances" in sample`` work too.

    Attributes:
        kind: annotation kind of the image, one of :data:`KINDS`.
        source: name of its :class:`~ovdet2.data.source_spec.SourceSpec`: "DATASETS.TRAIN", an entry of
            DATASETS.SOURCES, or a data set of an evaluation; "" for an image of no source.
        file_name: of the image file; "" for pixels given directly.
        image_id: of the data set.
        height, width: pixels of the original image as it is shown (after the EXIF rotation); if the data set does not
            state them, 0 until decoding. Detections are given in these pixels.
        annotations: Detectron2's annotation dicts, boxes in pixels of the original image, ``category_id`` contiguous
            and base first; None for a source without boxes, and after the last step.
        captions: texts that describe the image.
        labels: contiguous ids of classes that the image is stated to contain, without boxes.
        pixels: array [H, W, C] uint8 in INPUT.FORMAT, between decoding and the last step; None elsewhere.
        transforms: Detectron2's TransformList that led from the original pixels to ``image``; None after the last step.
        annotation_indices: Tensor [M] int64, index in ``annotations`` of each of the ``instances``; None after the last
            step.
        image: Tensor [3, H, W] uint8 in INPUT.FORMAT, augmented; None until a step has made it.
        instances: :class:`Instances` of the M objects in pixels of ``image``: ``gt_boxes`` (XYXY), ``gt_classes``
            int64, and ``gt_masks`` if masks are on; None at test and without boxes.
        attachments: objects that methods have attached, by their class.
    """

    kind: str = BOXES
    source: str = ""
    file_name: str = ""
    image_id: int = 0
    height: int = 0
    width: int = 0
    annotations: list[dict[str, Any]] | None = None
    captions: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    pixels: np.ndarray | None = None
    transforms: T.TransformList | None = None
    annotation_indices: torch.Tensor | None = None
    image: torch.Tensor | None = None
    instances: Instances | None = None
    attachments: dict[type, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: "Sample | Mapping[str, Any]") -> "Sample":
        """A Detectron2 record as a sample; keys that are no fields are ignored. A Sample is returned unchanged."""
        if isinstance(record, Sample):
            return record
        return cls(**{name: record[name] for name in _FIELDS if name in record})

    @property
    def kept(self) -> torch.Tensor | None:
        """Former name of :attr:`annotation_indices`."""
        return self.annotation_indices

    @property
    def name(self) -> str:
        """Name of the image in messages: file name and id."""
        return f"{self.file_name or None} (id {self.image_id})"

    def attach(self, value: object) -> None:
        """Attach an object of a method; it replaces an attached one of the same class."""
        self.attachments[type(value)] = value

    def attached(self, kind: type[Attachment]) -> Attachment:
        """The attached object of a class, see :meth:`attach`.

        Raises:
            UsageError: there is none; the message names the image and the class.
        """
        value = self.attachments.get(kind)
        if value is None:
            raise UsageError(
                f"{self.name} comes without {kind.__name__}, which a part of the detector needs: load the data with "
                "the steps of this configuration (ovdet2.data.steps.build_steps), or let Detector prepare the image."
            )
        return value

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """A field by its name; ``default`` if there is no such field, or it is None."""
        value = getattr(self, key, None) if key in _FIELDS else None
        return default if value is None else value


_FIELDS = frozenset(item.name for item in fields(Sample))


def as_samples(batch: Iterable["Sample | Mapping[str, Any]"]) -> list[Sample]:
    """A batch of samples or Detectron2 records as samples."""
    return [Sample.of(record) for record in batch]


def of_kind(samples: Sequence[Sample], kind: str) -> list[Sample]:
    """The samples of one annotation kind, in their order."""
    return [sample for sample in samples if sample.kind == kind]
