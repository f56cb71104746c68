"""AlignNet: the encoder's features of an object are drawn to its attributes (CLIP-DETR, Eq. 1, 4, 5).

Shapes: B images, M objects of the batch, L levels, C channels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovdet2.errors import UsageError
from ovdet2.modeling.contrastive import gather_rows, symmetric_info_nce
from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy
from ovdet2.modeling.detr.memory import Memory
from ovdet2.modeling.detr.targets import Targets

_MAX_LOG_SCALE = math.log(100)
_SAMPLES = 2  # per side of a bin
# Objects of one label are no negatives of each other if the logarithms of their sides differ by less.
_LARGEST_DIFFERENCE = {"none": 0.0, "near": 0.1, "label": math.inf}


class AlignNet(nn.Module):
    """Symmetric cross-entropy between pooled encoder features and attributes, every object its own class."""

    def __init__(self, strides: Sequence[int], roi_size: int = 7, ignored: str = "none", gather: bool = False) -> None:
        """
        Args:
            strides: L ints, pixels between the cells of each level.
            roi_size: bins per side of RoIAlign, whose mean is taken.
            ignored: which objects are no negatives of each other: "none", as in the paper; "near", those of one label
                and nearly one size; "label", all of one label.
            gather: over the objects of all processes instead of one's own.

        Raises:
            UsageError: another value of ``ignored``.
        """
        super().__init__()
        if ignored not in _LARGEST_DIFFERENCE:
            choices = ", ".join(_LARGEST_DIFFERENCE)
            raise UsageError(f"MODEL.CLIP_DETR.IGNORED_PAIRS is {ignored!r}: choose one of {choices}.")
        self.strides, self.roi_size = tuple(strides), roi_size
        self.ignored, self.gather = ignored, gather
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as CLIP's starts, and is capped

    def forward(self, memory: Memory, targets: Targets, attributes: Tensor) -> Tensor:
        """
        Args:
            memory: :class:`~ovdet2.modeling.detr.memory.Memory`.
            targets: :class:`~ovdet2.modeling.detr.targets.Targets`.
            attributes: Tensor [M, C], z_attr.

        Returns:
            Scalar Tensor, float32 or float64; 0 with one object or none. A collective call with ``gather``.
        """
        with torch.autocast(memory.tokens.device.type, enabled=False):
            encoded = pooled_objects(memory, targets, self.strides, self.roi_size)
            sides = targets.boxes_cxcywh[:, 2:].to(encoded).log()
            parts = [encoded, attributes.to(encoded), targets.labels[:, None].to(encoded), sides]
            if self.gather:  # as one Tensor, of which every process has one gradient to exchange
                rows, _ = gather_rows(torch.cat(parts, dim=1))
                parts = rows.split([part.shape[1] for part in parts], dim=1)
            encoded, attributes, labels, sides = parts
            with torch.no_grad():  # the parameter itself: beyond a cap on its value no gradient would bring it back
                self.log_scale.clamp_(max=_MAX_LOG_SCALE)
            logits = self.log_scale.exp() * F.normalize(encoded, dim=1) @ F.normalize(attributes, dim=1).T
            ignored = near_duplicates(labels[:, 0], sides, _LARGEST_DIFFERENCE[self.ignored])
            return symmetric_info_nce(logits, ignored)


def pooled_objects(memory: Memory, targets: Targets, strides: Sequence[int], roi_size: int = 7) -> Tensor:
    """z_enc: the mean of an object's box over the maps of all levels (Eq. 1).

    Boxes are in pixels over the stride: shares of the valid cells, as the decoder's references are, would be another
    place in another batch, since of a coarse map a cell more or less counts as valid. RoIAlign takes the map to go on
    beyond its border as it ends there; so does the image's part of a padded map here.

    Args:
        memory: :class:`~ovdet2.modeling.detr.memory.Memory`.
        targets: :class:`~ovdet2.modeling.detr.targets.Targets`.
        strides: L ints, pixels between the cells of each level.
        roi_size: bins per side.

    Returns:
        Tensor [M, C], float32 or float64.
    """
    dtype = torch.promote_types(memory.tokens.dtype, torch.float32)
    device = memory.tokens.device
    boxes_xyxy = cxcywh_to_xyxy(targets.boxes_cxcywh).to(dtype)
    image = torch.repeat_interleave(torch.arange(len(targets.counts)), torch.tensor(targets.counts)).to(device)
    pooled = []
    sizes = torch.tensor(targets.image_sizes, dtype=dtype).flip(1).to(device)  # B x 2: width, height
    for features, stride in zip(memory.levels(), strides, strict=True):
        cells = sizes / stride
        rois = torch.cat([image[:, None].to(dtype), boxes_xyxy * cells[image].repeat(1, 2)], dim=1)
        features = _continued(features.to(dtype), cells.ceil().long())
        bins = roi_align(features, rois, roi_size, sampling_ratio=_SAMPLES, aligned=True)
        pooled.append(bins.mean(dim=(2, 3)))
    return torch.stack(pooled).mean(dim=0)


def near_duplicates(labels: Tensor, log_sides: Tensor, most: float) -> Tensor:
    """Pairs of one label and about one size.

    Args:
        labels: Tensor [M].
        log_sides: Tensor [M, 2], logarithms of width and height.
        most: difference of either that is too much.

    Returns:
        Tensor [M, M] bool, the diagonal included.
    """
    near = (log_sides[:, None] - log_sides[None]).abs() < most
    return (labels[:, None] == labels[None]) & near.all(dim=2)


def _continued(features, valid):
    """Maps whose first padded column and row are those before them, as far as bilinear sampling within can see.

    Args:
        features: Tensor [B, C, h, w].
        valid: Tensor [B, 2] int64, (columns, rows) that show the image.
    """
    for dim, counts in ((3, valid[:, 0]), (2, valid[:, 1])):
        shape = [len(features), 1, 1, 1]
        shape[dim] = -1
        first_padded = torch.arange(features.shape[dim], device=features.device) == counts[:, None]
        features = torch.where(first_padded.view(shape), features.roll(1, dim), features)
    return features
