"""F-VLM (Kuo et al., ICLR 2023): CLIP embeddings of regions pooled from the map of a frozen CLIP trunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method

if TYPE_CHECKING:
    pass


class FVLM(Method):
    """The secondary scores "map" of a detector on a frozen CLIP trunk."""

    name = "fvlm"
    hosts = ("FrozenVLMRCNN",)
    secondary_scores = ("map",)
    OLD_KEYS = {"MODEL.OVD.VLM_TEMPERATURE": "MODEL.FVLM.TEMPERATURE"}

    def add_keys(self, cfg: CfgNode) -> None:
        """MODEL.FVLM.*"""
        cfg.MODEL.FVLM = CN()
        # tau of the secondary scores "map", whose softmax is over the words and the background.
        cfg.MODEL.FVLM.TEMPERATURE = 0.01

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether it gives the secondary scores."""
        return cfg.MODEL.OVD.SECONDARY_SCORES == "map"


METHOD = FVLM()
