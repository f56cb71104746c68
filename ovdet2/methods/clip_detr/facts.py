"""Published figures of CLIP-DETR (anonymous, under review) for configurations of this repository; none was run here.

By configuration: the source, and figures by the kind of output and the names of report.json. The headers of the
configurations state the same numbers.
"""

PAPER = "paper, not run here"

EXPECTED: dict[str, dict[str, str | dict[str, float]]] = {
    "coco/clip_detr_r50_12ep.yaml": {"source": PAPER, "bbox": {"AP": 50.8}},
    "coco/clip_detr_align_r50_12ep.yaml": {"source": PAPER, "bbox": {"AP": 49.8}},
    "coco/clip_detr_dynql_r50_12ep.yaml": {"source": PAPER, "bbox": {"AP": 49.3}},
    "coco/clip_detr_rn50x64_12ep.yaml": {"source": PAPER, "bbox": {"AP": 52.0}},
    "coco/clip_detr_swinl_36ep.yaml": {"source": PAPER, "bbox": {"AP": 58.6}},
    "lvis/clip_detr_r50_12ep.yaml": {"source": PAPER, "bbox": {"AP": 35.6, "APr": 19.2, "APc": 33.7, "APf": 44.1}},
    "lvis/clip_detr_r50_12ep_lsj.yaml": {"source": PAPER, "bbox": {"AP": 35.8, "APr": 19.7, "APc": 33.8, "APf": 44.2}},
}
