"""ViLD (Gu et al., ICLR 2022): distillation of CLIP crop embeddings of regions into a Faster R-CNN. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method
from ovdet2.errors import UsageError

if TYPE_CHECKING:
    from ovdet2.data.source_spec import SourceSpec
    from ovdet2.data.steps.step import Step
    from ovdet2.methods.vild.part import ViLDPart
    from ovdet2.modeling.host import Host


CROP_HEADS = "CropROIHeads"


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
        # Distillation of the teacher's region embeddings, computed offline by ovdet2 cache build.
        cfg.MODEL.VILD = CN()
        # w of ViLD's loss; 0 trains without (ViLD-text) and reads no cache.
        cfg.MODEL.VILD.WEIGHT = 0.0
        # A separate box head and projection for distillation (ViLD-ensemble), instead of the classifier's.
        cfg.MODEL.VILD.OWN_HEAD = False
        # Folder of the region cache of DATASETS.TRAIN.
        cfg.MODEL.VILD.REGION_CACHE = ""
        # Cached regions used per image and step, drawn at random if there are more.
        cfg.MODEL.VILD.REGIONS_PER_IMAGE = 300

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether it distils, computes the secondary scores, or classifies the crops of a closed set's boxes."""
        scores = cfg.MODEL.OVD.SECONDARY_SCORES in self.secondary_scores
        return cfg.MODEL.VILD.WEIGHT > 0 or scores or cfg.MODEL.ROI_HEADS.NAME == CROP_HEADS

    def trains_words(self, cfg: CfgNode) -> bool:
        """Whether the distillation loss is on."""
        return cfg.MODEL.VILD.WEIGHT > 0

    def check(self, cfg: CfgNode) -> None:
        """Refuse settings without effect, and settings that would leave the text classifier untrained.

        Raises:
            UsageError: such a setting; the message names its key.
        """
        ovd, vild = cfg.MODEL.OVD, cfg.MODEL.VILD
        if cfg.MODEL.ROI_HEADS.NAME == CROP_HEADS and (
            vild.WEIGHT or ovd.SECONDARY_SCORES != "none" or cfg.MODEL.MASK_ON
        ):
            raise UsageError(
                f"{CROP_HEADS} take all scores from CLIP and have no masks: set MODEL.VILD.WEIGHT to 0, "
                "MODEL.OVD.SECONDARY_SCORES to none and MODEL.MASK_ON to False."
            )
        if vild.WEIGHT < 0:
            raise UsageError(f"MODEL.VILD.WEIGHT is {vild.WEIGHT}: it must not be negative.")
        if (vild.WEIGHT > 0 or ovd.SECONDARY_SCORES == "image") and ovd.CLASSIFIER != "text":
            raise UsageError(
                f'MODEL.OVD.CLASSIFIER is {ovd.CLASSIFIER!r}, but only "text" has an embedding to distil into: set '
                "MODEL.VILD.WEIGHT to 0 and MODEL.OVD.SECONDARY_SCORES to none."
            )
        if vild.WEIGHT > 0:
            _check_distillation(cfg)
        elif vild.OWN_HEAD:
            raise UsageError("MODEL.VILD.OWN_HEAD requires MODEL.VILD.WEIGHT above 0: no other loss trains that head.")

    def build(self, cfg: CfgNode, host: Host) -> ViLDPart | None:
        """Build the part of an R-CNN host; None if ViLD is off, or without a part."""
        if not self.is_on(cfg) or cfg.MODEL.ROI_HEADS.NAME == CROP_HEADS:
            return None
        from ovdet2.methods.vild.part import build_part

        return build_part(cfg, host)

    def register(self) -> None:
        """Import the RoI heads of CLIP on the boxes of a published detector."""
        from ovdet2.methods.vild import crop_heads  # noqa: F401

    def steps(self, cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
        """Steps that attach cached regions to training images with boxes, if the weight is above 0."""
        from ovdet2.data.samples import BOXES
        from ovdet2.methods.vild.sample import AttachCachedRegions, open_region_cache

        if not is_train or source.kind != BOXES or cfg.MODEL.VILD.WEIGHT <= 0:
            return []
        return [AttachCachedRegions(open_region_cache(cfg, source.datasets), cfg.MODEL.VILD.REGIONS_PER_IMAGE)]


def _check_distillation(cfg):
    """Refuse settings that contradict a MODEL.VILD.WEIGHT above 0."""
    ovd, vild = cfg.MODEL.OVD, cfg.MODEL.VILD
    if vild.REGIONS_PER_IMAGE < 1:
        raise UsageError(
            f"MODEL.VILD.REGIONS_PER_IMAGE is {vild.REGIONS_PER_IMAGE}: set at least 1, or MODEL.VILD.WEIGHT to 0."
        )
    if vild.OWN_HEAD and ovd.SECONDARY_SCORES != "image":
        raise UsageError('MODEL.VILD.OWN_HEAD trains a head that only MODEL.OVD.SECONDARY_SCORES "image" uses.')
    if ovd.CLS_LOSS_WEIGHT == 0:
        if vild.OWN_HEAD:
            raise UsageError("MODEL.OVD.CLS_LOSS_WEIGHT 0 with MODEL.VILD.OWN_HEAD leaves the classifier untrained.")
        if ovd.SECONDARY_SCORES != "image" or ovd.SECONDARY_USE == "fuse":
            raise UsageError(
                "MODEL.OVD.CLS_LOSS_WEIGHT 0 leaves the background embedding untrained: use only the image branch, "
                'MODEL.OVD.SECONDARY_SCORES "image" with SECONDARY_USE "only" or "only_objectness".'
            )
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
        raise UsageError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES cannot be combined with distillation: set it to False."
        )


METHOD = ViLD()
