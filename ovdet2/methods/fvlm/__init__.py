"""F-VLM (Kuo et al., ICLR 2023): CLIP embeddings of regions from the map of a frozen CLIP trunk. See README.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detectron2.config import CfgNode
from detectron2.config import CfgNode as CN

from ovdet2.config.method import Method
from ovdet2.errors import UsageError

if TYPE_CHECKING:
    from ovdet2.methods.fvlm.part import FVLMPart
    from ovdet2.modeling.host import Host


class FVLM(Method):
    """Secondary scores "map": CLIP scores of proposals from the feature map of a frozen CLIP trunk."""

    name = "fvlm"
    hosts = ("FrozenVLMRCNN",)
    secondary_scores = ("map",)
    scores_background = True
    reads_background = True
    OLD_KEYS = {"MODEL.OVD.VLM_TEMPERATURE": "MODEL.FVLM.TEMPERATURE"}

    def add_keys(self, cfg: CfgNode) -> None:
        """MODEL.FVLM.*"""
        cfg.MODEL.FVLM = CN()
        # tau of the secondary scores "map", whose softmax is over the words and the background.
        cfg.MODEL.FVLM.TEMPERATURE = 0.01

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether it computes the secondary scores."""
        return cfg.MODEL.OVD.SECONDARY_SCORES == "map"

    def check(self, cfg: CfgNode) -> None:
        """Refuse a temperature that is not positive.

        Raises:
            UsageError: such a temperature.
        """
        if cfg.MODEL.FVLM.TEMPERATURE <= 0:
            raise UsageError(f"MODEL.FVLM.TEMPERATURE is {cfg.MODEL.FVLM.TEMPERATURE}: it must be above 0.")

    def build(self, cfg: CfgNode, host: Host) -> FVLMPart | None:
        """Build the part of the frozen-VLM host; None if it is off."""
        if not self.is_on(cfg):
            return None
        from ovdet2.methods.fvlm.part import FVLMPart
        from ovdet2.modeling.backbone import CLIPPyramid

        assert isinstance(host.backbone, CLIPPyramid)  # FrozenVLMRCNN requires it
        return FVLMPart(host.backbone, host.bank, cfg.MODEL.FVLM.TEMPERATURE)


METHOD = FVLM()
