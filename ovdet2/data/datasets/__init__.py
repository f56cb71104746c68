"""Importing this package registers every data set; no file is read before one is loaded."""

from ovdet2.data.datasets import closed_coco, closed_lvis, ov_coco, ov_lvis, ov_shapes, transfer  # noqa: F401
from ovdet2.data.datasets.register import register_ov_dataset, split_of  # noqa: F401
