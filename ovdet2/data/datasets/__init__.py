"""Importing this package registers every data set; no file is read before one is loaded."""

import importlib.util

from ovdet2.data.datasets import ov_coco  # noqa: F401

if importlib.util.find_spec("ovdet2.data.datasets.ov_shapes"):
    from ovdet2.data.datasets import ov_shapes  # noqa: F401
