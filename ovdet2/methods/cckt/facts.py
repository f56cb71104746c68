"""Published figures of CCKT-Det (Zhang et al.) for configurations of this repository; none was run here.

By configuration: the source, and figures by the kind of output and the names of report.json. The headers of the
configurations state the same numbers.
"""

PAPER = "paper, not run here"
LANGUAGE_MODEL = "paper, with the priors of a language model (CCKT-Det++), not run here"
TRANSFER = "paper, CCKT-Det++, whose backbone is not stated, not run here"

EXPECTED: dict[str, dict[str, str | dict[str, float]]] = {
    "ovcoco/cckt_r50.yaml": {"source": PAPER, "bbox": {"AP50-novel": 38.0, "AP50-all": 35.0}},
    "ovcoco/cckt_swinb.yaml": {"source": PAPER, "bbox": {"AP50-novel": 41.9, "AP50-all": 40.9}},
    "ovlvis/cckt_r50.yaml": {"source": LANGUAGE_MODEL, "bbox": {"AP": 27.1, "APr": 18.2}},
    "transfer/ovlvis_cckt_r50_coco.yaml": {"source": TRANSFER, "bbox": {"AP": 38.5, "AP50": 53.2, "AP75": 42.1}},
    "transfer/ovlvis_cckt_r50_objects365.yaml": {"source": TRANSFER, "bbox": {"AP": 15.2, "AP50": 20.9, "AP75": 15.8}},
}

# The same weights of the OV-COCO rows with the priors of a language model.
PLUS_PLUS: dict[str, dict[str, str | dict[str, float]]] = {
    "ovcoco/cckt_r50.yaml": {"source": LANGUAGE_MODEL, "bbox": {"AP50-novel": 45.3, "AP50-all": 46.9}},
    "ovcoco/cckt_swinb.yaml": {"source": LANGUAGE_MODEL, "bbox": {"AP50-novel": 46.0, "AP50-all": 46.2}},
}
