"""AlignNet: contrastive loss between encoder features and attributes of objects (CLIP-DETR, Eq. 1, 4, 5).

Shapes: B images, M objects of the batch, L levels, C channels.
Names: ``_xyxy`` boxes (left, top, right, bottom), ``_cxcywh`` boxes (centre x, centre y, width, height).
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
_SAMPLES = 2  # RoIAlign samples per side of a bin
# "near": objects of the same label whose log widths and log heights differ by less are not negatives.
_LARGEST_DIFFERENCE = {"none": 0.0, "near": 0.1, "label": math.inf}


class AlignNet(nn.Module):
    """Symmetric cross-entropy (InfoNCE) between pooled encoder features and attributes of objects."""

    def __init__(self, strides: Sequence[int], roi_size: int = 7, ignored: str = "none", gather: bool = False) -> None:
        """
        Args:
            strides: L ints, pixels between the cells of each level.
            roi_size: bins per side of RoIAlign, which are averaged.
            ignored: pairs of objects that are not negatives: "none", as in the paper; "near": same label and nearly
                the same size; "label": same label.
            gather: use the objects of all processes, not only of this one.

        Raises:
            UsageError: ``ignored`` is unknown.
        """
        super().__init__()
        if ignored not in _LARGEST_DIFFERENCE:
            choices = ", ".join(_LARGEST_DIFFERENCE)
            raise UsageError(f"MODEL.CLIP_DETR.IGNORED_PAIRS is {ignored!r}: choose one of {choices}.")
        self.strides, self.roi_size = tuple(strides), roi_size
        self.ignored, self.gather = ignored, gather
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # initial value and cap of CLIP

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
            if self.gather:  # one Tensor: one gradient exchange
                rows, _ = gather_rows(torch.cat(parts, dim=1))
                parts = rows.split([part.shape[1] for part in parts], dim=1)
            encoded, attributes, labels, sides = parts
            with torch.no_grad():  # clamp the parameter, not its use: beyond the cap the gradient would be 0
                self.log_scale.clamp_(max=_MAX_LOG_SCALE)
            logits = self.log_scale.exp() * F.normalize(encoded, dim=1) @ F.normalize(attributes, dim=1).T
            ignored = near_duplicates(labels[:, 0], sides, _LARGEST_DIFFERENCE[self.ignored])
            return symmetric_info_nce(logits, ignored)


def pooled_objects(memory: Memory, targets: Targets, strides: Sequence[int], roi_size: int = 7) -> Tensor:
    """z_enc: RoIAlign features of each object, averaged over bins and levels (Eq. 1).

    Box coordinates are pixels / stride. The decoder's references are relative to the valid cells instead; with these
    the pooled position would depend on the padding of the batch, since the number of valid cells of a coarse map does.
    RoIAlign extends a map beyond its border by the border's values; padded maps are extended in the same way.

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
    """Pairs of objects with the same label and nearly the same size.

    Args:
        labels: Tensor [M].
        log_sides: Tensor [M, 2], logarithms of width and height.
        most: exclusive upper bound of the differences of log width and log height.

    Returns:
        Tensor [M, M] bool, the diagonal included.
    """
    near = (log_sides[:, None] - log_sides[None]).abs() < most
    return (labels[:, None] == labels[None]) & near.all(dim=2)


def _continued(features, valid):
    """Copy the last valid column and row of maps into the first padded ones, which bilinear sampling may read.

    Args:
        features: Tensor [B, C, h, w].
        valid: Tensor [B, 2] int64, numbers of valid (columns, rows).
    """
    for dim, counts in ((3, valid[:, 0]), (2, valid[:, 1])):
        shape = [len(features), 1, 1, 1]
        shape[dim] = -1
        first_padded = torch.arange(features.shape[dim], device=features.device) == counts[:, None]
        features = torch.where(first_padded.view(shape), features.roll(1, dim), features)
    return features
