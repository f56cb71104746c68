"""One-to-one matching of queries and objects (Carion et al., ECCV 2020, Eq. 1), with the focal class cost of
Deformable DETR.

Shapes: L decoder layers, B images, N queries, K words, X the most objects of one image.
Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid,
``_cxcywh`` boxes (centre x, centre y, width, height).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ovdet2.errors import NumericalError
from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy, generalized_iou
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.targets import Matches, Targets

# (weight, function): the function maps the outputs and the padded labels [B, X] to a cost Tensor [L, B, N, X].
MatchingCost = tuple[float, Callable[[DetrOutputs, Tensor], Tensor]]


def class_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Classification cost: change of a query's focal loss if it is assigned a label instead of background.

    Args:
        logits: Tensor [..., N, K].
        labels: Tensor [..., X] int64, 0..K-1.
        alpha, gamma: of the focal loss.

    Returns:
        Tensor [..., N, X]: alpha (1 - p)^gamma (-log p) - (1 - alpha) p^gamma (-log(1 - p)), p the probability of the
        label.
    """
    logits = logits.gather(-1, labels[..., None, :].expand(*logits.shape[:-1], labels.shape[-1]))
    probability = logits.sigmoid()
    positive = alpha * (1 - probability) ** gamma * F.softplus(-logits)
    return positive - (1 - alpha) * probability**gamma * F.softplus(logits)


def box_costs(boxes_cxcywh: Tensor, target_boxes_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and negative generalised IoU of all pairs: [..., N, 4] and [..., X, 4] -> two Tensors [..., N, X]."""
    l1 = torch.cdist(boxes_cxcywh, target_boxes_cxcywh, p=1)
    queries, targets = cxcywh_to_xyxy(boxes_cxcywh), cxcywh_to_xyxy(target_boxes_cxcywh)
    return l1, -generalized_iou(queries[..., :, None, :], targets[..., None, :, :])


class HungarianMatcher:
    """Finds the one-to-one pairs of queries and objects with the least total cost, per decoder layer and image."""

    def __init__(
        self,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        extra_costs: Iterable[MatchingCost] = (),
    ) -> None:
        """
        Args:
            class_weight, l1_weight, giou_weight: weights of the three costs.
            alpha, gamma: of the focal class cost.
            extra_costs: further costs, of parts.
        """
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight
        self.alpha, self.gamma = alpha, gamma
        self.extra_costs = tuple(extra_costs)

    @torch.no_grad()
    def cost(self, outputs: DetrOutputs, targets: Targets) -> Tensor:
        """The weighted sum of the costs.

        Args:
            outputs: outputs with the logits of every layer.
            targets: objects of the B images.

        Returns:
            Tensor [L, B, N, X], float32 or float64; columns beyond an image's objects are padding.
        """
        logits, boxes = _full_precision(outputs.pred_logits), _full_precision(outputs.pred_boxes)
        layers = len(logits)
        labels = targets.padded(targets.labels)
        target_boxes = targets.padded(targets.boxes_cxcywh).to(boxes)
        with torch.autocast(logits.device.type, enabled=False):
            l1, giou = box_costs(boxes, target_boxes.expand(layers, -1, -1, -1))
            cost = self.l1_weight * l1 + self.giou_weight * giou
            every_layer = labels.expand(layers, -1, -1)
            cost = cost + self.class_weight * class_cost(logits, every_layer, self.alpha, self.gamma)
            for weight, extra in self.extra_costs:
                cost = cost + weight * extra(outputs, labels)
        return cost

    def __call__(self, outputs: DetrOutputs, targets: Targets, valid: Tensor | None = None) -> list[Matches]:
        """Match every layer independently.

        Args:
            outputs, targets: as of :meth:`cost`.
            valid: Tensor [B, N] bool, the queries that may be matched; None: all.

        Returns:
            The pairs of each of the L layers, on the device of the outputs. An image has min(objects, queries)
            pairs.

        Raises:
            NumericalError: a cost is not finite; the message names the image. This FloatingPointError is raised within
                the forward pass, which stops the training in all processes.
        """
        layers, device = outputs.layers, outputs.pred_boxes.device
        pairs = [[np.empty((3, 0), np.int64)] for _ in range(layers)]
        if len(targets):
            cost = self.cost(outputs, targets).cpu().numpy()  # of all layers and images in one transfer
            allowed = None if valid is None else valid.cpu().numpy()
            starts = np.cumsum((0, *targets.counts))
            for image, count in enumerate(targets.counts):
                queries = np.arange(cost.shape[2]) if allowed is None else np.flatnonzero(allowed[image])
                for layer in range(layers):
                    table = cost[layer, image, queries, :count]
                    _require_finite(table, targets.names[image], layer)
                    rows, columns = linear_sum_assignment(table)
                    pairs[layer].append(np.stack([np.full_like(rows, image), queries[rows], starts[image] + columns]))
        joined = [np.concatenate(of_layer, axis=1) for of_layer in pairs]
        on_device = torch.from_numpy(np.concatenate(joined, axis=1)).to(device, non_blocking=True)
        return [Matches(*part) for part in on_device.split([of_layer.shape[1] for of_layer in joined], dim=1)]


def _require_finite(table, name, layer):
    if not np.isfinite(table).all():
        raise NumericalError(
            f"the cost of matching queries with the objects of {name} is not finite (decoder layer {layer}): the "
            "network's logits or boxes of this image, or its annotated boxes, are not finite."
        )


def _full_precision(tensor):
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
