"""AlignNet: the encoder's features of an object are drawn to its attributes (CLIP-DETR, Eq. 1, 4, 5).

Shapes: B images, M objects of the batch, L levels, C channels.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from ovdet2.modeling.contrastive import gather_rows, symmetric_info_nce
from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy

_MAX_LOG_SCALE = math.log(100)
_SAMPLES = 2  # per side of a bin
_NEAR = 0.1  # difference of log sides below which two sizes count as one


class AlignNet(nn.Module):
    """Symmetric cross-entropy between pooled encoder features and attributes, every object its own class."""

    def __init__(self, roi_size=7, ignore_near_duplicates=False, gather=False):
        """
        Args:
            roi_size: bins per side of RoIAlign, whose mean is taken.
            ignore_near_duplicates: objects of one label and nearly one size are no negatives of each other (the paper
                has them so).
            gather: over the objects of all processes instead of one's own.
        """
        super().__init__()
        self.roi_size = roi_size
        self.ignore_near_duplicates, self.gather = ignore_near_duplicates, gather
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as CLIP's starts, and is capped

    def forward(self, memory, targets, attributes):
        """
        Args:
            memory: :class:`~ovdet2.modeling.detr.memory.Memory`.
            targets: :class:`~ovdet2.modeling.detr.targets.Targets`.
            attributes: Tensor [M, C], z_attr.

        Returns:
            Scalar Tensor, float32 or float64; 0 with one object or none. A collective call with ``gather``.
        """
        with torch.autocast(memory.tokens.device.type, enabled=False):
            encoded = pooled_objects(memory, targets, self.roi_size)
            sides = targets.boxes_cxcywh[:, 2:].to(encoded).log()
            parts = [encoded, attributes.to(encoded), targets.labels[:, None].to(encoded), sides]
            if self.gather:  # as one Tensor, of which every process has one gradient to exchange
                rows, _ = gather_rows(torch.cat(parts, dim=1))
                parts = rows.split([part.shape[1] for part in parts], dim=1)
            encoded, attributes, labels, sides = parts
            with torch.no_grad():  # the parameter itself: beyond a cap on its value no gradient would bring it back
                self.log_scale.clamp_(max=_MAX_LOG_SCALE)
            logits = self.log_scale.exp() * F.normalize(encoded, dim=1) @ F.normalize(attributes, dim=1).T
            ignored = near_duplicates(labels[:, 0], sides) if self.ignore_near_duplicates else None
            return symmetric_info_nce(logits, ignored)


def pooled_objects(memory, targets, roi_size=7):
    """z_enc: the mean of an object's box over the maps of all levels (Eq. 1).

    RoIAlign takes the map to go on beyond its border as it ends there; so does the valid part of a padded map here.

    Args:
        memory: :class:`~ovdet2.modeling.detr.memory.Memory`.
        targets: :class:`~ovdet2.modeling.detr.targets.Targets`.
        roi_size: bins per side.

    Returns:
        Tensor [M, C], float32 or float64.
    """
    dtype = torch.promote_types(memory.tokens.dtype, torch.float32)
    device = memory.tokens.device
    boxes_xyxy = cxcywh_to_xyxy(targets.boxes_cxcywh).to(dtype)
    image = torch.repeat_interleave(torch.arange(len(targets.counts)), torch.tensor(targets.counts)).to(device)
    pooled = []
    for level, features in enumerate(memory.levels()):
        size = features.new_tensor(features.shape[:1:-1], dtype=dtype)  # width, height
        valid = memory.valid_ratios[:, level].to(dtype) * size  # B x 2, cells
        rois = torch.cat([image[:, None].to(dtype), boxes_xyxy * valid[image].repeat(1, 2)], dim=1)
        features = _continued(features.to(dtype), valid.round().long())
        bins = roi_align(features, rois, roi_size, sampling_ratio=_SAMPLES, aligned=True)
        pooled.append(bins.mean(dim=(2, 3)))
    return torch.stack(pooled).mean(dim=0)


def near_duplicates(labels, log_sides):
    """Pairs of one label whose widths and heights differ by less than a tenth.

    Args:
        labels: Tensor [M].
        log_sides: Tensor [M, 2], logarithms of width and height.

    Returns:
        Tensor [M, M] bool, the diagonal included.
    """
    near = (log_sides[:, None] - log_sides[None]).abs() < _NEAR
    return (labels[:, None] == labels[None]) & near.all(dim=2)


def _continued(features, valid):
    """Maps whose first padded column and row are those before them, as far as bilinear sampling within can see.

    Args:
        features: Tensor [B, C, h, w].
        valid: Tensor [B, 2] int64, (columns, rows) that are not padding.
    """
    for dim, counts in ((3, valid[:, 0]), (2, valid[:, 1])):
        shape = [len(features), 1, 1, 1]
        shape[dim] = -1
        first_padded = torch.arange(features.shape[dim], device=features.device) == counts[:, None]
        features = torch.where(first_padded.view(shape), features.roll(1, dim), features)
    return features
