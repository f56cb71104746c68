"""CLIP-DETR: what AlignNet and dynamic query learning add to a training step. At test there is nothing of either.

Names of losses: ``loss_align``; ``loss_class_dynamic``, ``loss_l1_dynamic`` and ``loss_giou_dynamic`` for the last
decoder layer, the same followed by ``_<l>`` for the layers l = 0, 1, ... before it.

Shapes: L decoder layers, B images, N conventional queries, S sets of X members, P members that are no padding.
"""

from dataclasses import replace

import torch
from torch import nn

from ovdet2.modeling.detr.criterion import mean_box_count


class CLIPDETR(nn.Module):
    """AlignNet, dynamic queries, or both, over the same attributes."""

    def __init__(self, attributes, align_net=None, dynamic_queries=None):
        """
        Args:
            attributes: :class:`~ovdet2.methods.clip_detr.object_attributes.ObjectAttributes`.
            align_net: :class:`~ovdet2.methods.clip_detr.align_net.AlignNet`, or None.
            dynamic_queries: :class:`~ovdet2.methods.clip_detr.dynamic_queries.DynamicQueries`, or None.
        """
        super().__init__()
        self.attributes, self.align_net, self.dynamic_queries = attributes, align_net, dynamic_queries

    def forward(self, transformer, decode, memory, queries, targets, criterion):
        """Decode a training batch.

        Args:
            transformer: :class:`~ovdet2.modeling.detr.transformer.DeformableTransformer` of the detector.
            decode: function of queries, and of an ``attention_mask`` if there is one, that gives the outputs of all
                layers, as of :meth:`DeformableDETR.decode`.
            memory, queries: what is decoded; a method may have altered the queries.
            targets: :class:`~ovdet2.modeling.detr.targets.Targets`.
            criterion: :class:`~ovdet2.modeling.detr.criterion.SetCriterion`, whose losses the dynamic queries have.

        Returns:
            (outputs of the conventional queries, dict of unweighted losses). Collective calls.
        """
        attributes, losses = self.attributes(targets), {}
        if self.align_net is not None:
            losses["loss_align"] = self.align_net(memory, targets, attributes)
        if self.dynamic_queries is None:
            return decode(queries), losses
        encode = transformer.query_maker.encode_position
        if queries.position is None:
            queries = replace(queries, position=encode(queries.references))
        sets = self.dynamic_queries(queries, targets, attributes, encode, transformer.heads)
        outputs, dynamic = split_outputs(decode(sets.queries, attention_mask=sets.hidden), queries.content.shape[1])
        return outputs, losses | dynamic_losses(dynamic, targets, sets, criterion)


def dynamic_losses(outputs, targets, sets, criterion):
    """The detector's losses of dynamic queries, each assigned to its object, over S times the objects (Eq. 10).

    Args:
        outputs: dict with "pred_logits" [L, B, S X, K] and "pred_boxes" [L, B, S X, 4].
        targets: :class:`~ovdet2.modeling.detr.targets.Targets`.
        sets: :class:`~ovdet2.methods.clip_detr.dynamic_queries.DynamicSets`.
        criterion: :class:`~ovdet2.modeling.detr.criterion.SetCriterion`.

    Returns:
        dict of scalar Tensors. A collective call.
    """
    matches = sets.matches
    divisor = sets.sets * mean_box_count(sets.objects, matches.target.device)
    # Members of padding are left out; the others become one image of P queries, each with its pair.
    pairs = replace(
        matches, image=torch.zeros_like(matches.image), query=torch.arange(len(matches), device=matches.query.device)
    )
    last, losses = len(outputs["pred_logits"]) - 1, {}
    for layer in range(0 if criterion.auxiliary else last, last + 1):
        logits, boxes = (outputs[name][layer, matches.image, matches.query] for name in ("pred_logits", "pred_boxes"))
        of_layer = criterion.losses_of(logits[None], boxes[None], targets, pairs, divisor)
        place = "" if layer == last else f"_{layer}"
        losses.update((f"{name}_dynamic{place}", value) for name, value in of_layer.items())
    return losses


def split_outputs(outputs, count):
    """(outputs of the first ``count`` queries, of the others); what is of the encoder stays with the former.

    Args:
        outputs: dict as of :meth:`DeformableDETR.decode`.
        count: N.
    """
    first, others = {}, {}
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            first[name], others[name] = value[:, :, :count], value[:, :, count:]
        elif isinstance(value, list):  # of a Tensor for each layer
            first[name], others[name] = [part[:, :count] for part in value], [part[:, count:] for part in value]
        else:
            first[name] = value
    return first, others
