"""Deformable DETR from an image batch to logits and boxes of every decoder layer.

Shapes: B images, N queries, C channels, K classes, Ld decoder layers.
Names: ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

from collections.abc import Sequence

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.memory import Memory, Queries
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.position_encoding import level_masks
from ovdet2.modeling.detr.transformer import DeformableTransformer


class DeformableDETR(nn.Module):
    """Backbone, neck, transformer and class branches. Losses and post-processing are separate objects."""

    def __init__(
        self,
        backbone: Backbone,
        neck: MultiScaleNeck,
        transformer: DeformableTransformer,
        class_branches: Sequence[nn.Module],
        in_features: Sequence[str],
    ) -> None:
        """
        Args:
            backbone: Detectron2 Backbone, from Tensor [B, 3, H, W] to a dict of maps.
            neck: backbone maps -> levels of C channels; transformer: levels -> hidden states and boxes of queries.
            class_branches: modules from Tensor [B, N, C] to logits [B, N, K]: one per decoder layer if the layers
                refine boxes, else one for all.
            in_features: names of the backbone's maps, finest first.

        Raises:
            UsageError: the number of class branches is wrong.
        """
        super().__init__()
        if len(class_branches) != transformer.num_branches:
            raise UsageError(
                f"{len(class_branches)} class branches were given, the transformer requires {transformer.num_branches}."
            )
        self.backbone, self.neck, self.transformer = backbone, neck, transformer
        self.class_branches = nn.ModuleList(class_branches)
        self.in_features = tuple(in_features)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels, finest first."""
        shapes = self.backbone.output_shape()
        strides = [shapes[name].stride for name in self.in_features]
        coarser = range(1, len(self.neck.levels) - len(strides) + 1)
        return (*strides, *(strides[-1] * 2**step for step in coarser))

    def features(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
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

    def classify(self, hidden: Tensor, all_layers: bool) -> Tensor:
        """Class logits of queries.

        Args:
            hidden: Tensor [Ld, B, N, C].
            all_layers: whether to classify every layer, or only the last one. With 21,000 words the other layers would
                cost more than the rest of the detector.

        Returns:
            Tensor [Ld or 1, B, N, K].
        """
        branches = list(self.class_branches) * (len(hidden) if len(self.class_branches) == 1 else 1)
        pairs = list(zip(branches, hidden))
        return torch.stack([branch(states) for branch, states in (pairs if all_layers else pairs[-1:])])

    def encode(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Memory:
        """Encode images; arguments as of :meth:`features`."""
        return self.transformer.encode(*self.features(images, image_sizes))

    def decode(
        self,
        memory: Memory,
        queries: Queries,
        attention_mask: Tensor | None = None,
        all_layers: bool | None = None,
        keep_sampling: bool = False,
    ) -> DetrOutputs:
        """
        Args:
            memory: of :meth:`encode`.
            queries: any number of queries.
            attention_mask, keep_sampling: of :meth:`DeformableTransformer.decode`.
            all_layers: whether to return the logits of every layer; None: in training.
        """
        decoded = self.transformer.decode(memory, queries, attention_mask, keep_sampling)
        return DetrOutputs(
            self.classify(decoded.hidden, self.training if all_layers is None else all_layers),
            decoded.boxes_cxcywh,
            decoded.hidden,
            decoded.references,
            decoded.sampling_locations,
            decoded.sampling_weights,
            queries.encoder_outputs,
        )

    def forward(
        self,
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        all_layers: bool | None = None,
        keep_sampling: bool = False,
    ) -> DetrOutputs:
        """:meth:`encode`, the transformer's queries, :meth:`decode`: the published model."""
        memory = self.encode(images, image_sizes)
        queries = self.transformer.queries(memory)
        return self.decode(memory, queries, all_layers=all_layers, keep_sampling=keep_sampling)
