"""Importing this package registers every data set; its files are read only when it is loaded."""

from ovdet2.data.datasets import (  # noqa: F401
    closed_coco,
    closed_lvis,
    coco_captions,
    ov_coco,
    ov_lvis,
    ov_shapes,
    ov_shapes_captions,
    transfer,
)
from ovdet2.data.datasets.register import register_ov_dataset, split_of  # noqa: F401
from ovdet2.data.datasets.register_readers import register_captions, register_image_labels  # noqa: F401
