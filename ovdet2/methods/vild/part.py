"""ViLD on an R-CNN host: distillation of CLIP crop embeddings, and the secondary scores "image" and "crops".

Shapes: R regions, R' cached regions, C channels, S pooled side, F features of the box head, K words, D embedding
dimension. Names: ``_probs`` probabilities in [0, 1], ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from detectron2.structures import Boxes
from torch import Tensor, nn

from ovdet2.data.samples import Sample
from ovdet2.layers import EmbeddingProjection
from ovdet2.methods.vild.crop_scorer import CropScorer
from ovdet2.methods.vild.losses import embedding_l1
from ovdet2.methods.vild.sample import CachedRegions
from ovdet2.modeling.build import build_teacher
from ovdet2.modeling.rcnn.part import RCNNPart, RegionBatch

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from ovdet2.modeling.host import Host


class ImageHead(nn.Module):
    """ViLD-ensemble's second head: a box head and a projection that only the distillation loss trains."""

    def __init__(self, box_head: nn.Module, input_dim: int, embed_dim: int) -> None:
        """
        Args:
            box_head: module, pooled features [R, C, S, S] -> [R, F].
            input_dim: F.
            embed_dim: D.
        """
        super().__init__()
        self.box_head = box_head
        self.projection = EmbeddingProjection(input_dim, embed_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features [R, C, S, S] -> unit embeddings [R, D], float32."""
        return self.projection(self.box_head(pooled))


class ViLDPart(RCNNPart):
    """Distillation into the classifier's head (ViLD, ViLD-image) or into a second head (ViLD-ensemble).

    The distilled embeddings give the secondary scores "image"; the teacher's embeddings of crops give "crops".
    """

    def __init__(
        self,
        weight: float = 0.0,
        image_head: ImageHead | None = None,
        scores_images: bool = False,
        crop_scorer: nn.Module | None = None,
    ) -> None:
        """
        Args:
            weight: w of the distillation loss; 0: no distillation, and samples need no cached regions.
            image_head: second head; None: distil into the detector's box head and the classifier's projection.
            scores_images: at test, compute the secondary scores "image".
            crop_scorer: at test, computes the secondary scores "crops": (image [3, H, W], boxes [R, 4]) -> [R, K], such as
                a :class:`CropScorer`.
        """
        super().__init__({"loss_distillation": weight})
        self.weight = weight
        self.image_head = image_head
        self.scores_images = scores_images
        self.crop_scorer = crop_scorer
        self.shares_head = image_head is None

    def own_boxes(self, samples: Sequence[Sample]) -> list[Boxes] | None:
        """The cached regions of each image; None without distillation.

        Raises:
            UsageError: an image has none attached.
        """
        if not self.weight:
            return None
        return [Boxes(sample.attached(CachedRegions).boxes_xyxy) for sample in samples]

    def losses(self, batch: RegionBatch) -> dict[str, Tensor]:
        """ "loss_distillation" (Eq. 3) of the cached regions; 0 without any."""
        if not self.weight:
            return {}
        if self.image_head is None:
            assert batch.own_features is not None  # of own_boxes, through the detector's box head
            student = batch.heads.text_classifier.embed(batch.own_features)
        else:
            assert batch.own_pooled is not None  # of own_boxes
            count = len(batch.own_pooled)
            # A batch without a region still runs the head: its parameters need a gradient in every process.
            student = self.image_head(batch.own_pooled if count else batch.pooled[:2])[:count]
        # Cast first: CPU autocast cannot concatenate float16.
        teacher = torch.cat([sample.attached(CachedRegions).embeddings.to(student) for sample in batch.samples])
        return {"loss_distillation": embedding_l1(student, teacher)}

    def secondary_probs(self, batch: RegionBatch) -> list[Tensor] | None:
        """Probabilities [R_i, K] of the words, without background; None if another source is configured."""
        if self.crop_scorer is not None:
            return [
                self.crop_scorer(sample.image, of_image.proposal_boxes.tensor)
                for sample, of_image in zip(batch.samples, batch.proposals)
            ]
        if not self.scores_images:
            return None
        classifier, head = batch.heads.text_classifier, self.image_head
        embeddings = classifier.embed(batch.box_features) if head is None else head(batch.pooled)
        probs = classifier.classify_without_background(embeddings)
        return list(probs.split(batch.counts))


def build_part(cfg: CfgNode, host: Host) -> ViLDPart:
    """Build the part of a configuration.

    Raises:
        DataError: with the secondary scores "crops", the vocabulary is of another teacher than MODEL.TEACHER.
    """
    image_head, crop_scorer = None, None
    if cfg.MODEL.VILD.OWN_HEAD:
        assert host.roi_heads is not None and host.build_box_head is not None  # ViLD supports only R-CNN hosts
        box_head = host.build_box_head()
        image_head = ImageHead(box_head, host.roi_heads.feature_dim, host.bank.embeddings.shape[1])
    if cfg.MODEL.OVD.SECONDARY_SCORES == "crops":
        crop_scorer = CropScorer(build_teacher(cfg), host.bank, cfg.INPUT.FORMAT)
    return ViLDPart(cfg.MODEL.VILD.WEIGHT, image_head, cfg.MODEL.OVD.SECONDARY_SCORES == "image", crop_scorer)
