"""Ground truth and detections of a data set as columns, the input of the metrics and the report.

Shapes: G ground-truth boxes, R detections. Boxes are XYXY in pixels of the original image.
Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovdet2.data.datasets.coco_json import Split


@dataclass(frozen=True)
class Truth:
    """The annotations of a data set.

    Attributes:
        images: {image id: the data set's record of it, without annotations}, by ascending id.
        ann_ids: [G] int64.
        image_ids: [G] int64.
        category_ids: [G] int64, the data set's own.
        boxes_xyxy: [G, 4] float64.
        areas: [G] float64, square pixels, "area" of the annotation (of its mask in COCO).
        crowd: [G] bool, objects that do not count: crowds and difficult objects.
        segmentations: list of G in COCO's form, or None for a data set without masks.
        difficult: [G] bool, which of ``crowd`` are single objects; None if none is.
    """

    images: dict
    ann_ids: np.ndarray
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes_xyxy: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    segmentations: list | None = None
    difficult: np.ndarray | None = None

    @property
    def many(self) -> np.ndarray:
        """[G] bool: regions of many objects, on which a detection is by the share of it that lies within."""
        return self.crowd if self.difficult is None else self.crowd & ~self.difficult

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]], split: Split, masks: bool = False) -> "Truth":
        """From Detectron2 records.

        Args:
            records: list of dicts as of :func:`~ovdet2.data.datasets.coco_json.load_ov_json`.
            split: the data set's :class:`~ovdet2.data.datasets.coco_json.Split`.
            masks: whether the annotations hold segmentations.
        """
        rows = [(record["image_id"], annotation) for record in records for annotation in record["annotations"]]
        annotations = [annotation for _, annotation in rows]

        def column(key, dtype):
            return np.array([annotation[key] for annotation in annotations], dtype=dtype)

        boxes = column("bbox", np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return cls(
            images={
                record["image_id"]: {key: value for key, value in record.items() if key != "annotations"}
                for record in records
            },
            ann_ids=column("id", np.int64),
            image_ids=np.array([image_id for image_id, _ in rows], dtype=np.int64),
            category_ids=np.asarray(split.category_ids, dtype=np.int64)[column("category_id", np.int64)],
            boxes_xyxy=boxes,
            areas=column("area", np.float64),
            crowd=column("iscrowd", bool),
            segmentations=[annotation["segmentation"] for annotation in annotations] if masks else None,
            difficult=np.array([annotation.get("difficult", False) for annotation in annotations], dtype=bool),
        )


@dataclass(frozen=True)
class Detections:
    """The detections of a data set, those of an image together and by descending score.

    Attributes:
        image_ids: [R] int64.
        category_ids: [R] int64, the data set's own.
        scores: [R] float32.
        boxes_xyxy: [R, 4] float32.
        masks: a sequence of R COCO run-length codes ({"size": [h, w], "counts": str}), or None.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes_xyxy: np.ndarray
    masks: object = None

    def __len__(self):
        return len(self.scores)
