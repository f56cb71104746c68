"""Detectron2's RPN with the average of the box loss of the releases of ViLD and F-VLM.

Shapes: N images, L levels, A anchors of a level.
Names: ``pred_`` predicted, ``gt_`` ground truth, ``_logits`` before softmax or sigmoid, ``_deltas`` box regression
relative to proposals or references.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes
from torch import Tensor

from ovdet2.errors import UsageError

BOX_AVERAGES = ("sampled", "positives_per_level")


@PROPOSAL_GENERATOR_REGISTRY.register()
class OpenVocabularyRPN(RPN):
    """An RPN whose box loss is divided by the number of sampled anchors (Detectron2), or averaged level by level.

    "positives_per_level": the mean over the coordinates of the positive anchors of a level, summed over the levels.
    """

    @configurable
    def __init__(self, *, box_average: str = "sampled", **kwargs: Any) -> None:
        """
        Args:
            box_average: one of BOX_AVERAGES.
            kwargs: as of :class:`RPN`.

        Raises:
            UsageError: an unknown average.
        """
        super().__init__(**kwargs)
        if box_average not in BOX_AVERAGES:
            raise UsageError(f"MODEL.RPN.BBOX_REG_AVERAGE is {box_average!r}: choose one of {', '.join(BOX_AVERAGES)}.")
        self.box_average = box_average

    @classmethod
    def from_config(  # pyrefly: ignore[bad-override]  `configurable` passes on all arguments
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> dict[str, Any]:
        """Arguments from MODEL.RPN.BBOX_REG_AVERAGE and the keys of :class:`RPN`."""
        return super().from_config(cfg, input_shape) | {"box_average": cfg.MODEL.RPN.BBOX_REG_AVERAGE}

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See :class:`RPN`; "loss_rpn_loc" is averaged as the class describes.

        Args:
            anchors: L sets of A boxes.
            pred_objectness_logits: L tensors [N, A].
            gt_labels: N tensors of all anchors: 1 positive, 0 negative, -1 not sampled.
            pred_anchor_deltas: L tensors [N, A, 4].
            gt_boxes: N tensors of the matched boxes of all anchors, XYXY in pixels.
        """
        losses = super().losses(anchors, pred_objectness_logits, gt_labels, pred_anchor_deltas, gt_boxes)
        if self.box_average == "sampled":
            return losses
        positive, start, means = torch.stack(gt_labels) == 1, 0, []
        for of_level, deltas in zip(anchors, pred_anchor_deltas):
            rows = slice(start, start + len(of_level))
            start = rows.stop
            loss = _dense_box_regression_loss(
                [of_level],
                self.box2box_transform,
                [deltas],
                [boxes[rows] for boxes in gt_boxes],
                positive[:, rows],
                box_reg_loss_type=self.box_reg_loss_type,
                smooth_l1_beta=self.smooth_l1_beta,
            )
            means.append(loss / (4 * positive[:, rows].sum()).clamp(min=1))
        return losses | {"loss_rpn_loc": torch.stack(means).sum() * self.loss_weight.get("loss_rpn_loc", 1.0)}
