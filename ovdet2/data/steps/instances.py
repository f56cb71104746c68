"""Convert annotations to Detectron2 ``Instances``, the targets of a detector.

Shapes: M objects. Names: ``gt_`` ground truth.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data.dataset_mapper import DatasetMapper
from detectron2.data.transforms import TransformList
from detectron2.structures import Instances

from ovdet2.data.samples import Sample
from ovdet2.data.steps.step import Step
from ovdet2.errors import DataError

_INDEX = "annotation_index"  # temporary field of the Instances, while Detectron2 filters them


class AttachInstances(Step):
    """Sets ``instances`` and ``annotation_indices``, the index of each instance in the unchanged ``annotations``.

    Crowds, and objects outside of the augmented image, are skipped.
    """

    def __init__(
        self,
        *,
        use_masks: bool = False,
        mask_format: str = "polygon",
        use_keypoints: bool = False,
        keypoint_hflip_indices: np.ndarray | None = None,
        recompute_boxes: bool = False,
    ) -> None:
        """
        Args:
            use_masks, use_keypoints: attach ``gt_masks`` and ``gt_keypoints``.
            mask_format: INPUT.MASK_FORMAT, "polygon" or "bitmask".
            keypoint_hflip_indices: of :func:`detectron2.data.detection_utils.create_keypoint_hflip_indices`.
            recompute_boxes: make boxes tight around the cropped masks.
        """
        self.use_masks, self.mask_format = use_masks, mask_format
        self.use_keypoints, self.keypoint_hflip_indices = use_keypoints, keypoint_hflip_indices
        self.recompute_boxes = recompute_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> AttachInstances:
        """The step with the arguments that Detectron2's DatasetMapper has in training."""
        arguments: dict[str, Any] = DatasetMapper.from_config(cfg, True)
        return cls(
            use_masks=arguments["use_instance_mask"],
            mask_format=arguments["instance_mask_format"],
            use_keypoints=arguments["use_keypoint"],
            keypoint_hflip_indices=arguments.get("keypoint_hflip_indices"),
            recompute_boxes=arguments["recompute_boxes"],
        )

    def __call__(self, sample: Sample) -> None:
        """
        Raises:
            DataError: masks that are not in INPUT.MASK_FORMAT.
        """
        if sample.annotations is None:
            return
        assert sample.image is not None and sample.transforms is not None, "augment the image first"
        size = (sample.image.shape[1], sample.image.shape[2])
        try:
            instances = self._instances(sample.annotations, sample.transforms, size)
        except ValueError as error:
            raise DataError(
                f"{sample.file_name} (image id {sample.image_id}): {error} For run-length codes set "
                "INPUT.MASK_FORMAT to bitmask."
            ) from None
        sample.annotation_indices = instances.get(_INDEX)
        instances.remove(_INDEX)
        sample.instances = instances

    def _instances(
        self, annotations: list[dict[str, Any]], transforms: TransformList, size: tuple[int, int]
    ) -> Instances:
        indices = [index for index, annotation in enumerate(annotations) if not annotation.get("iscrowd", 0)]
        transformed = [self._transformed(annotations[index], transforms, size) for index in indices]
        instances = detection_utils.annotations_to_instances(transformed, size, mask_format=self.mask_format)
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        instances.set(_INDEX, torch.tensor(indices, dtype=torch.int64))
        nonempty = detection_utils.filter_empty_instances(instances)
        assert isinstance(nonempty, Instances)  # return_mask is off
        return nonempty

    def _transformed(
        self, annotation: dict[str, Any], transforms: TransformList, size: tuple[int, int]
    ) -> dict[str, Any]:
        ignored = [] if self.use_masks else ["segmentation"]
        ignored += [] if self.use_keypoints else ["keypoints"]
        annotation = copy.deepcopy({key: value for key, value in annotation.items() if key not in ignored})
        return detection_utils.transform_instance_annotations(
            annotation, transforms, size, keypoint_hflip_indices=self.keypoint_hflip_indices
        )
