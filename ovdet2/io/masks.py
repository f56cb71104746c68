"""Masks as COCO's run-length codes."""

from typing import Any, cast

import numpy as np
from pycocotools import mask as mask_api


def run_length_code(mask: np.ndarray) -> dict[str, Any]:
    """The "segmentation" of COCO's json, {"size": [H, W], "counts": str}, of a mask, bool array [H, W]."""
    code = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": cast(bytes, code["counts"]).decode("ascii")}
