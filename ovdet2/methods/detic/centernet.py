"""Class-agnostic proposals of CenterNet (Zhou et al., 2019, 2021) on a feature pyramid.

A cell (i, j) of a level of stride s has its centre at ((j + 1/2) s, (i + 1/2) s), a heat p (the probability that an object
is centred there) and four distances d >= 0 in units of s. Its box is [x - s d_1, y - s d_2, x + s d_3, y + s d_4] and its
objectness sqrt(p).

Shapes: N images, L levels, C channels, h and w cells of a level, R proposals.
Names: ``gt_`` ground truth, ``_logits`` before softmax or sigmoid, ``_probs`` probabilities in [0, 1],
``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ovdet2.errors import UsageError

_MIN_SIDE = 0.01  # pixels
_LOGIT_LIMIT = 1e-6  # logits are of probabilities this far from 0 and 1


class Scale(nn.Module):
    """A learned factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """``scale * x``."""
        return self.scale * x


class CenterNetHead(nn.Module):
    """Four convolutions with group norm, shared by all levels; then heat and distances, each by one convolution."""

    def __init__(self, channels: int, levels: int) -> None:
        """
        Args:
            channels: C of every level.
            levels: L; each has a factor of its distances.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(4):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(32, channels), nn.ReLU()]
        self.bbox_tower = nn.Sequential(*layers)
        self.agn_hm = nn.Conv2d(channels, 1, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(levels))

    def forward(self, levels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """
        Args:
            levels: L maps [N, C, h, w].

        Returns:
            For each level heat logits [N, h w] and distances [N, h w, 4] in strides.
        """
        outputs = []
        for level, scale in zip(levels, self.scales, strict=True):
            tower = self.bbox_tower(level)
            heat_logits = self.agn_hm(tower).flatten(1)
            distances = scale(self.bbox_pred(tower)).relu().flatten(2).transpose(1, 2)
            outputs.append((heat_logits, distances))
        return outputs


def cell_centres(height: int, width: int, stride: int, device: torch.device) -> Tensor:
    """Centres (x, y) of the cells of a level in pixels: Tensor [h w, 2], row by row."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    return (torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5) * stride


def boxes_of_cells(centres: Tensor, distances: Tensor) -> Tensor:
    """Boxes from distances to the centre of a cell.

    Args:
        centres: Tensor [R, 2], pixels.
        distances: Tensor [R, 4] to the left, top, right and bottom side, pixels.

    Returns:
        XYXY Tensor [R, 4]; a side has at least 0.01 pixels. Boxes are not clipped to the image.
    """
    corners = centres - distances[:, :2]
    return torch.cat([corners, torch.maximum(centres + distances[:, 2:], corners + _MIN_SIDE)], dim=1)


def best_cells(heat_probs: Tensor, threshold: float, topk: int) -> Tensor:
    """Indices of the ``topk`` cells of highest heat among those above ``threshold``: Tensor [h w] -> long [R]."""
    cells = torch.nonzero(heat_probs > threshold).flatten()
    if len(cells) <= topk:
        return cells
    return cells[heat_probs[cells].topk(topk, sorted=False).indices]


def select_proposals(boxes_xyxy: Tensor, scores: Tensor, iou_threshold: float, topk: int) -> tuple[Tensor, Tensor]:
    """NMS over all levels, then the ``topk`` highest scores; ties with the last one are kept too.

    Args:
        boxes_xyxy: Tensor [R, 4].
        scores: Tensor [R].
        iou_threshold: of NMS.
        topk: number of proposals.

    Returns:
        (boxes, scores) by descending score.
    """
    keep = batched_nms(boxes_xyxy, scores, torch.zeros_like(scores, dtype=torch.long), iou_threshold)
    boxes_xyxy, scores = boxes_xyxy[keep], scores[keep]
    if len(scores) > topk:
        count = int((scores >= scores[topk - 1]).sum())
        boxes_xyxy, scores = boxes_xyxy[:count], scores[:count]
    return boxes_xyxy, scores


@PROPOSAL_GENERATOR_REGISTRY.register()
class CenterNetProposals(nn.Module):
    """Proposals of each image with ``proposal_boxes``, ``scores`` (objectness sqrt(p)) and ``objectness_logits``.

    The boxes are not clipped. ``objectness_logits`` are the logits of ``scores``, as Detectron2's RPN gives them.
    """

    @configurable
    def __init__(
        self,
        *,
        head: CenterNetHead,
        in_features: Sequence[str],
        strides: Sequence[int],
        score_threshold: float,
        pre_nms_topk: int,
        nms_threshold: float,
        post_nms_topk: int,
    ) -> None:
        """
        Args:
            head: :class:`CenterNetHead`.
            in_features: names of the L levels, finest first.
            strides: of the levels.
            score_threshold: cells of lower heat are dropped.
            pre_nms_topk: candidates of each level.
            nms_threshold: IoU of NMS.
            post_nms_topk: proposals of an image.
        """
        super().__init__()
        self.centernet_head = head
        self.in_features = tuple(in_features)
        self.strides = tuple(strides)
        self.score_threshold = score_threshold
        self.pre_nms_topk = pre_nms_topk
        self.nms_threshold = nms_threshold
        self.post_nms_topk = post_nms_topk

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from MODEL.DETIC and MODEL.RPN.

        Raises:
            UsageError: a level is unknown.
        """
        rpn = cfg.MODEL.RPN
        unknown = [name for name in rpn.IN_FEATURES if name not in input_shape]
        if unknown:
            raise UsageError(f"MODEL.RPN.IN_FEATURES names {unknown}, but the backbone has {list(input_shape)}.")
        shapes = [input_shape[name] for name in rpn.IN_FEATURES]
        return {
            "head": CenterNetHead(cast(int, shapes[0].channels), len(shapes)),
            "in_features": rpn.IN_FEATURES,
            "strides": [cast(int, shape.stride) for shape in shapes],
            "score_threshold": cfg.MODEL.DETIC.PROPOSAL_SCORE_THRESH,
            "pre_nms_topk": rpn.PRE_NMS_TOPK_TEST,
            "nms_threshold": rpn.NMS_THRESH,
            "post_nms_topk": rpn.POST_NMS_TOPK_TEST,
        }

    def forward(
        self, images: ImageList, features: Mapping[str, Tensor], gt_instances: list[Instances] | None = None
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        Args:
            images: batch, for the sizes of its images.
            features: maps of the backbone by name.
            gt_instances: None.

        Returns:
            (proposals of each image, best first; {}).

        Raises:
            UsageError: in training.
        """
        if self.training:
            raise UsageError("Detic's networks have no losses here: they take published weights for detection only.")
        levels = [features[name] for name in self.in_features]
        outputs = [(heat.float().sigmoid(), far.float()) for heat, far in self.centernet_head(levels)]
        centres = [
            cell_centres(level.shape[2], level.shape[3], stride, level.device)
            for level, stride in zip(levels, self.strides)
        ]
        return [self._of_image(number, outputs, centres, size) for number, size in enumerate(images.image_sizes)], {}

    def _of_image(self, number, outputs, centres, image_size):
        boxes, probs = [], []
        for (heat_probs, distances), of_level, stride in zip(outputs, centres, self.strides):
            cells = best_cells(heat_probs[number], self.score_threshold, self.pre_nms_topk)
            boxes.append(boxes_of_cells(of_level[cells], stride * distances[number, cells]))
            probs.append(heat_probs[number, cells])
        boxes_xyxy, scores = select_proposals(
            torch.cat(boxes), torch.cat(probs).sqrt(), self.nms_threshold, self.post_nms_topk
        )
        return Instances(
            image_size,
            proposal_boxes=Boxes(boxes_xyxy),
            scores=scores,
            objectness_logits=scores.logit(_LOGIT_LIMIT),
        )
