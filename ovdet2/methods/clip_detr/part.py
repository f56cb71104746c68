"""CLIP-DETR: AlignNet and dynamic query learning in a training step. At test the part is not built.

Names of losses: ``loss_align``; ``loss_class_dynamic``, ``loss_l1_dynamic`` and ``loss_giou_dynamic`` for the last
decoder layer, the same followed by ``_<l>`` for the layers l = 0, 1, ... before it.

Shapes: L decoder layers, B images, N conventional queries, S sets of X members, P members that are no padding.
Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ovdet2.methods.clip_detr.align_net import AlignNet
from ovdet2.methods.clip_detr.dynamic_queries import DynamicQueries, DynamicSets
from ovdet2.methods.clip_detr.object_attributes import ObjectAttributes
from ovdet2.modeling.detr.criterion import SetCriterion, mean_box_count
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.part import DetrPart, DetrStep, Prepared
from ovdet2.modeling.detr.targets import Targets


class CLIPDETR(DetrPart):
    """AlignNet, dynamic queries, or both, on the same object attributes."""

    training_only = True

    def __init__(
        self,
        attributes: ObjectAttributes,
        align_net: AlignNet | None = None,
        dynamic_queries: DynamicQueries | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            attributes: attributes of objects, for both.
            align_net: AlignNet, or None.
            dynamic_queries: dynamic queries, or None.
            loss_weights: weights of "loss_align" and of the losses of dynamic queries.
        """
        super().__init__(loss_weights)
        self.attributes, self.align_net, self.dynamic_queries = attributes, align_net, dynamic_queries

    def before_decoding(self, step: DetrStep) -> Prepared:
        """AlignNet's loss and the dynamic queries; ``state`` is their :class:`DynamicSets`. Draws random numbers; a
        collective call if AlignNet gathers."""
        attributes, losses = self.attributes(step.targets), dict[str, Tensor]()
        if self.align_net is not None:
            losses["loss_align"] = self.align_net(step.memory, step.targets, attributes)
        if self.dynamic_queries is None:
            return Prepared(losses)
        transformer = step.network.transformer
        encode = transformer.query_maker.encode_position
        sets = self.dynamic_queries(step.queries, step.targets, attributes, encode, transformer.heads)
        return Prepared(losses, sets.extra, sets)

    def losses_before_matching(
        self, step: DetrStep, prepared: Prepared, extra_outputs: DetrOutputs | None
    ) -> dict[str, Tensor]:
        """See :func:`dynamic_losses`."""
        if extra_outputs is None:
            return {}
        return dynamic_losses(extra_outputs, step.targets, prepared.state, step.criterion)


def dynamic_losses(
    outputs: DetrOutputs, targets: Targets, sets: DynamicSets, criterion: SetCriterion
) -> dict[str, Tensor]:
    """The detector's losses of dynamic queries, each assigned to its object, divided by S times the objects (Eq. 10).

    Args:
        outputs: outputs of the S X dynamic queries of each image.
        targets: the ground-truth objects.
        sets: the dynamic queries.
        criterion: the detector's criterion.

    Returns:
        dict of scalar Tensors. A collective call.
    """
    matches = sets.matches
    divisor = sets.sets * mean_box_count(sets.objects, matches.target.device)
    # Padding is removed; the other members become one image of P queries, each with its pair.
    pairs = replace(
        matches, image=torch.zeros_like(matches.image), query=torch.arange(len(matches), device=matches.query.device)
    )
    last, losses = outputs.layers - 1, dict[str, Tensor]()
    for layer in range(0 if criterion.auxiliary else last, last + 1):
        logits, boxes = (
            part[layer, matches.image, matches.query] for part in (outputs.pred_logits, outputs.pred_boxes)
        )
        of_layer = criterion.losses_of(logits[None], boxes[None], targets, pairs, divisor)
        place = "" if layer == last else f"_{layer}"
        losses.update((f"{name}_dynamic{place}", value) for name, value in of_layer.items())
    return losses
