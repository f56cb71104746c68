"""Deformable DETR from an image batch to logits and boxes of every decoder layer.

Shapes: B images, N queries, C channels, K classes, Ld decoder layers.
"""

import torch
from torch import nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.position_encoding import level_masks


class DeformableDETR(nn.Module):
    """Backbone, neck, transformer and class branches. Losses and post-processing are objects of their own."""

    def __init__(self, backbone, neck, transformer, class_branches, in_features):
        """
        Args:
            backbone: module from Tensor [B, 3, H, W] to a dict of maps.
            neck: :class:`~ovdet2.modeling.detr.neck.MultiScaleNeck`.
            transformer: :class:`~ovdet2.modeling.detr.transformer.DeformableTransformer`.
            class_branches: list of modules from Tensor [B, N, C] to logits [B, N, K]: one per decoder layer where the
                layers refine, one for all otherwise.
            in_features: names of the backbone's maps, finest first.

        Raises:
            UsageError: another number of class branches.
        """
        super().__init__()
        if len(class_branches) != transformer.num_branches:
            raise UsageError(
                f"{len(class_branches)} class branches were given, the transformer wants {transformer.num_branches}."
            )
        self.backbone, self.neck, self.transformer = backbone, neck, transformer
        self.class_branches = nn.ModuleList(class_branches)
        self.in_features = tuple(in_features)

    @property
    def strides(self):
        """Pixels between the cells of each level, finest first."""
        shapes = self.backbone.output_shape()
        strides = [shapes[name].stride for name in self.in_features]
        coarser = range(1, len(self.neck.levels) - len(strides) + 1)
        return (*strides, *(strides[-1] * 2**step for step in coarser))

    def features(self, images, image_sizes):
        """
        Args:
            images: Tensor [B, 3, H, W], normalised, padded at the right and the bottom.
            image_sizes: B (height, width) before padding.

        Returns:
            (maps, masks) as :meth:`DeformableTransformer.encode` takes them.
        """
        maps = self.backbone(images)
        maps = self.neck([maps[name] for name in self.in_features])
        shapes = [level.shape[-2:] for level in maps]
        return maps, level_masks(image_sizes, images.shape[-2:], shapes, images.device)

    def classify(self, hidden, all_layers):
        """Logits of queries.

        Args:
            hidden: Tensor [Ld, B, N, C].
            all_layers: of every layer, or of the last alone: with 21,000 words the others would cost more than the
                detector.

        Returns:
            Tensor [Ld or 1, B, N, K].
        """
        branches = list(self.class_branches) * (len(hidden) if len(self.class_branches) == 1 else 1)
        pairs = list(zip(branches, hidden))
        return torch.stack([branch(states) for branch, states in (pairs if all_layers else pairs[-1:])])

    def encode(self, images, image_sizes):
        """The :class:`~ovdet2.modeling.detr.memory.Memory` of images, as of :meth:`features`."""
        return self.transformer.encode(*self.features(images, image_sizes))

    def decode(self, memory, queries, attention_mask=None, all_layers=None, keep_sampling=False):
        """
        Args:
            memory: of :meth:`encode`.
            queries: :class:`~ovdet2.modeling.detr.memory.Queries`, of any number.
            attention_mask, keep_sampling: of :meth:`DeformableTransformer.decode`.
            all_layers: whether to return the logits of every layer; None: in training.

        Returns:
            dict: "pred_logits" Tensor [Ld or 1, B, N, K]; "pred_boxes" Tensor [Ld, B, N, 4], cxcywh in (0, 1) of the
            image without its padding; with two stages "encoder", a dict of the fields of
            :class:`~ovdet2.modeling.detr.memory.EncoderOutputs`; and all of :meth:`DeformableTransformer.decode`.
        """
        decoded = self.transformer.decode(memory, queries, attention_mask, keep_sampling)
        logits = self.classify(decoded["hidden"], self.training if all_layers is None else all_layers)
        encoder = {} if queries.encoder_outputs is None else {"encoder": queries.encoder_outputs._asdict()}
        return {"pred_logits": logits, "pred_boxes": decoded.pop("boxes_cxcywh"), **encoder, **decoded}

    def forward(self, images, image_sizes, all_layers=None, keep_sampling=False):
        """:meth:`encode`, the transformer's queries, :meth:`decode`: the published model."""
        memory = self.encode(images, image_sizes)
        queries = self.transformer.queries(memory)
        return self.decode(memory, queries, all_layers=all_layers, keep_sampling=keep_sampling)
