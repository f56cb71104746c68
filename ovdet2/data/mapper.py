"""The mapper that turns one data set record into what a model takes."""

import copy

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.dataset_mapper import DatasetMapper

from ovdet2.data.images import read_image
from ovdet2.errors import DataError, UsageError


class OpenVocabularyMapper(DatasetMapper):
    """Detectron2's mapper with our decoding, which applies INPUT.* (crop, resize, flip) as it does.

    A record is read, augmented, and returned with "image", a (3, H, W) uint8 tensor in INPUT.FORMAT, and in training
    with "instances" (boxes in pixels of the augmented image). The augmentations draw from numpy's global generator,
    which the loader seeds for each sample.
    """

    @classmethod
    def from_config(cls, cfg, is_train=True):
        """Detectron2's arguments.

        Raises:
            UsageError: MODEL.LOAD_PROPOSALS is on; its proposal files are pickles, which ovdet2 does not read.
        """
        if cfg.MODEL.LOAD_PROPOSALS:
            raise UsageError("MODEL.LOAD_PROPOSALS reads pickled files, which ovdet2 does not open: set it to False.")
        return super().from_config(cfg, is_train)

    def __call__(self, record):
        """Map one record.

        Args:
            record: dict in Detectron2's standard form; "file_name" is needed, "annotations" in training. Not changed.

        Returns:
            dict, the record with "image" and, in training, "instances"; without "annotations".

        Raises:
            DataError: the image cannot be read, or its size is not the one of the record.
        """
        record = copy.deepcopy(record)
        image = read_image(record["file_name"], self.image_format)
        _check_size(record, image)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, image.shape[:2])
        return record


def _check_size(record, image):
    """Compare with the annotated size (or fill it in): with another size every box would be misplaced."""
    height, width = image.shape[:2]
    annotated = record.setdefault("width", width), record.setdefault("height", height)
    if annotated != (width, height):
        raise DataError(
            f"{record['file_name']} (image id {record.get('image_id')}) is {width}x{height} pixels but the annotations "
            f"say {annotated[0]}x{annotated[1]}: the file is not the annotated one, or its EXIF rotation was not "
            "applied when it was annotated."
        )
