"""What ViLD adds to a training sample: cached region embeddings.

Shapes: R regions, D embedding dimension.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CachedRegions:
    """Regions of an image with the teacher's embeddings.

    Attributes:
        boxes_xyxy: Tensor [R, 4] float32, pixels of the augmented image, not empty.
        embeddings: Tensor [R, D] float16, unit rows before rounding.
    """

    boxes_xyxy: Tensor
    embeddings: Tensor
