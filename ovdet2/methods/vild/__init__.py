"""ViLD (Gu et al., ICLR 2022): distillation of CLIP crop embeddings of regions into a Faster R-CNN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method

if TYPE_CHECKING:
    from ovdet2.data.source_spec import SourceSpec
    from ovdet2.data.steps.step import Step


class ViLD(Method):
    """Distillation of cached region embeddings, and two sources of secondary scores."""

    name = "vild"
    hosts = ("OpenVocabularyRCNN", "FrozenVLMRCNN")
    secondary_scores = ("image", "crops")
    OLD_KEYS = {
        f"MODEL.DISTILLATION.{key}": f"MODEL.VILD.{key}"
        for key in ("WEIGHT", "OWN_HEAD", "REGION_CACHE", "REGIONS_PER_IMAGE")
    }
    OLD_WEIGHTS = {"roi_heads.image_head.": "vild.image_head."}

    def add_keys(self, cfg: CfgNode) -> None:
        """MODEL.VILD.*"""
        # Distillation of the teacher's region embeddings, computed offline by tools/build_region_cache.py.
        cfg.MODEL.VILD = CN()
        # w of ViLD's loss; 0 trains without (ViLD-text) and reads no cache.
        cfg.MODEL.VILD.WEIGHT = 0.0
        # A box head and projection for distillation alone (ViLD-ensemble), instead of the classifier's.
        cfg.MODEL.VILD.OWN_HEAD = False
        # Folder of the region cache of DATASETS.TRAIN.
        cfg.MODEL.VILD.REGION_CACHE = ""
        # Cached regions used per image and step, drawn at random where there are more.
        cfg.MODEL.VILD.REGIONS_PER_IMAGE = 300

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether it distils, or gives the secondary scores."""
        return cfg.MODEL.VILD.WEIGHT > 0 or cfg.MODEL.OVD.SECONDARY_SCORES in self.secondary_scores

    def steps(self, cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
        """Cached regions of training images with boxes, where the weight is above 0."""
        from ovdet2.data.samples import BOXES
        from ovdet2.methods.vild.sample import AttachCachedRegions, open_region_cache

        if not is_train or source.kind != BOXES or cfg.MODEL.VILD.WEIGHT <= 0:
            return []
        return [AttachCachedRegions(open_region_cache(cfg, source.datasets), cfg.MODEL.VILD.REGIONS_PER_IMAGE)]


METHOD = ViLD()
