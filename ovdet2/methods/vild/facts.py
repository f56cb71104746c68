"""Published figures of ViLD (Gu et al., ICLR 2022) for configurations of this repository; none was run here.

By configuration: the source, and figures by the kind of output and the names of report.json. The headers of the
configurations state the same numbers.
"""

PAPER = "paper, not run here"

EXPECTED: dict[str, dict[str, str | dict[str, float]]] = {
    "ovcoco/vild_r50.yaml": {"source": PAPER, "bbox": {"AP50-novel": 27.6, "AP50-base": 59.5, "AP50-all": 51.3}},
    "ovlvis/vild_text_r50.yaml": {"source": PAPER, "segm": {"AP": 24.9, "APr": 10.1, "APc": 23.9, "APf": 32.5}},
    "ovlvis/vild_image_r50.yaml": {"source": PAPER, "segm": {"AP": 11.2, "APr": 11.2, "APc": 11.3, "APf": 11.1}},
    "ovlvis/vild_r50.yaml": {"source": PAPER, "segm": {"AP": 22.5, "APr": 16.1, "APc": 20.0, "APf": 28.3}},
    "ovlvis/vild_ensemble_r50.yaml": {"source": PAPER, "segm": {"AP": 25.5, "APr": 16.6, "APc": 24.6, "APf": 30.3}},
}
