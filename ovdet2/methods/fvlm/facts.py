"""Published figures of F-VLM (Kuo et al., ICLR 2023), and of F-ViT (CLIM), for configurations of this repository; none
was run here.

By configuration: the source, and figures by the kind of output and the names of report.json. The headers of the
configurations state the same numbers.
"""

PAPER = "paper, not run here"

EXPECTED: dict[str, dict[str, str | dict[str, float]]] = {
    "ovcoco/fvlm_rn50.yaml": {"source": PAPER, "bbox": {"AP50-novel": 28.0}},
    "ovcoco/fvit_b16.yaml": {"source": PAPER, "bbox": {"AP50-novel": 21.6, "AP50-base": 36.4}},
    "ovlvis/fvlm_rn50.yaml": {"source": PAPER, "segm": {"APr": 18.6, "AP": 24.2}},
    "ovlvis/fvlm_rn50x4.yaml": {"source": PAPER, "segm": {"APr": 26.3, "AP": 28.5}},
    "ovlvis/fvlm_rn50x64.yaml": {"source": PAPER, "segm": {"APr": 32.8, "AP": 34.9}},
    "ovlvis/fvit_b16.yaml": {"source": PAPER, "segm": {"APr": 14.8}},
}
