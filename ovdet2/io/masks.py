"""Masks as COCO's run-length codes."""

from typing import cast

import numpy as np
from pycocotools import mask as mask_api
from torch import Tensor


def run_lengths(mask: Tensor) -> str:
    """The compressed run-length code, "counts" in COCO's json, of a mask, bool Tensor [H, W]."""
    columns = np.asfortranarray(mask.detach().cpu().numpy().astype(np.uint8))
    return cast(bytes, mask_api.encode(columns)["counts"]).decode("ascii")
