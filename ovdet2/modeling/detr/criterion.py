"""The losses of a query-based detector: one unweighted scalar per kind and decoder layer.

Losses: ``loss_<kind>`` for the last decoder layer, ``loss_<kind>_<l>`` for the layers l = 0, 1, ... before it, and
``loss_<kind>_encoder`` for the proposals of a two-stage encoder. Kinds: class, l1, giou.

Shapes: L decoder layers, B images, N queries, K words, S tokens of the encoder, P pairs.
Names: ``pred_`` predicted, ``gt_`` ground truth, ``_logits`` before softmax or sigmoid,
``_cxcywh`` boxes (centre x, centre y, width, height).
"""

import re
from collections.abc import Mapping

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy, generalized_iou
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.memory import EncoderOutputs
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.targets import Matches, Targets

_PLACE = re.compile(r"_(\d+|encoder)$")


class SetCriterion:
    """Matches the queries of every decoder layer with the objects and computes the losses."""

    def __init__(
        self,
        matcher: HungarianMatcher,
        encoder_matcher: HungarianMatcher | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        auxiliary: bool = True,
    ) -> None:
        """
        Args:
            matcher: matcher of the decoder layers.
            encoder_matcher: matcher of the proposals of a two-stage encoder, without costs that need words; None: use
                ``matcher``.
            alpha, gamma: of the focal loss.
            auxiliary: whether the layers before the last have losses, too.
        """
        self.matcher = matcher
        self.encoder_matcher = encoder_matcher or matcher
        self.alpha, self.gamma = alpha, gamma
        self.auxiliary = auxiliary

    def __call__(
        self, outputs: DetrOutputs, targets: Targets, num_boxes: Tensor | None = None
    ) -> tuple[dict[str, Tensor], list[Matches]]:
        """
        Args:
            outputs: with the logits of every layer. A two-stage detector also has ``encoder``; its invalid tokens are
                neither matched nor trained.
            targets: the ground-truth objects.
            num_boxes: result of :func:`mean_box_count`; None: computed here, a collective call.

        Returns:
            (losses, matches): unweighted scalar Tensors, float32 or float64, and the pairs of each layer with losses,
            those of the last layer last.

        Raises:
            UsageError: a label is not in 0..K-1.
            NumericalError: see :class:`~ovdet2.modeling.detr.matcher.HungarianMatcher`.
        """
        # Before matching: a process that raises at a non-finite cost must not leave the others waiting in this call.
        if num_boxes is None:
            num_boxes = mean_box_count(len(targets), outputs.pred_boxes.device)
        if not self.auxiliary:
            outputs = outputs.last_layer()
        logits, boxes = outputs.pred_logits, outputs.pred_boxes
        if targets.label_limit > logits.shape[-1]:
            raise UsageError(
                f"the batch has an object of class {targets.label_limit - 1}, but the classifier has the "
                f"{logits.shape[-1]} columns 0 to {logits.shape[-1] - 1} in training; images "
                f"{', '.join(targets.names)}: train on the data set whose base classes the vocabulary has."
            )
        matches, losses = self.matcher(outputs, targets), dict[str, Tensor]()
        for layer, found in enumerate(matches):
            place = "" if layer == len(matches) - 1 else f"_{layer}"
            of_layer = self.losses_of(logits[layer], boxes[layer], targets, found, num_boxes)
            losses.update((f"{name}{place}", value) for name, value in of_layer.items())
        if outputs.encoder is not None:
            losses.update(self._encoder_losses(outputs.encoder, targets.without_labels(), num_boxes))
        return losses, matches

    def losses_of(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, matches: Matches, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """The losses of one set of queries for given pairs, which come from matching or are assigned directly.

        Args:
            logits: Tensor [B, N, K].
            boxes_cxcywh: Tensor [B, N, 4].
            targets, matches: as returned by or given to :meth:`__call__`; an object may have several queries.
            num_boxes: number or scalar Tensor > 0 that the sums are divided by.

        Returns:
            dict of "loss_class", "loss_l1", "loss_giou".
        """
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        if boxes_cxcywh.dtype.itemsize < 4:
            boxes_cxcywh = boxes_cxcywh.float()
        with torch.autocast(logits.device.type, enabled=False):
            classes = class_targets(logits, targets, matches)
            pred_boxes = boxes_cxcywh[matches.image, matches.query]  # P x 4
            gt_boxes = targets.boxes_cxcywh[matches.target].to(pred_boxes)
            giou = generalized_iou(cxcywh_to_xyxy(pred_boxes), cxcywh_to_xyxy(gt_boxes))
            return {
                "loss_class": sigmoid_focal_loss(logits, classes, self.alpha, self.gamma, "sum") / num_boxes,
                "loss_l1": (pred_boxes - gt_boxes).abs().sum() / num_boxes,
                "loss_giou": (1 - giou).sum() / num_boxes,
            }

    def _encoder_losses(self, encoder: EncoderOutputs, targets: Targets, num_boxes: Tensor) -> dict[str, Tensor]:
        logits, boxes, valid = encoder
        proposals = DetrOutputs(
            logits[None], boxes[None], hidden=boxes[None, ..., :0]
        )  # their costs do not use the hidden states
        [matches] = self.encoder_matcher(proposals, targets, valid)
        # Not -inf: the background loss would be 0, but its gradient NaN.
        logits = logits.masked_fill(~valid[..., None], _SURE_BACKGROUND)
        losses = self.losses_of(logits, boxes, targets, matches, num_boxes)
        return {f"{name}_encoder": value for name, value in losses.items()}


# Sigmoid, focal loss and gradient of this logit are 0 in float32 and float64.
_SURE_BACKGROUND = -1e3


def class_targets(logits: Tensor, targets: Targets, matches: Matches) -> Tensor:
    """Targets of the focal loss: 1 at a matched query and its object's label, else 0.

    Args:
        logits: Tensor [B, N, K], for shape, type and device.
        targets, matches: :class:`Targets` and :class:`Matches`.

    Returns:
        Tensor [B, N, K].
    """
    classes = torch.zeros_like(logits)
    classes[matches.image, matches.query, targets.labels[matches.target]] = 1
    return classes


def mean_box_count(count: int, device: torch.device | str) -> Tensor:
    """Mean number of objects per process, at least 1: the normaliser of all losses; a collective call.

    Gradients are averaged over the processes, so the loss of the full batch is divided by its number of objects.

    Args:
        count: number of objects of this process.
        device: of the model.

    Returns:
        Scalar Tensor float32.
    """
    total = torch.tensor(float(count), device=device)
    if comm.get_world_size() > 1:
        dist.all_reduce(total)
    return (total / comm.get_world_size()).clamp(min=1)


def kind_of(name: str) -> str:
    """The name of a loss without the suffix "_<layer>" or "_encoder"."""
    return _PLACE.sub("", name)


def weighted(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Losses times the weight of their kind.

    Args:
        losses: dict as of :class:`SetCriterion`, whose names may end in a layer's number or in "_encoder".
        weights: dict {"loss_class": weight, ...} by name without that ending.

    Returns:
        dict with the names of ``losses``.

    Raises:
        KeyError: a kind without a weight.
    """
    return {name: weights[kind_of(name)] * value for name, value in losses.items()}
