"""The configurations of CCKT-Det: each builds, detects, and has the parts that its row of the table says."""

from pathlib import Path

import pytest
import torch

from ovdet2.config import load_config
from ovdet2.methods.cckt.tests.cckt_cases import samples
from tests.test_detr_configs import NARROW, built, detr_models, rates

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FOUND = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*cckt*.yaml"))
NAMES = [name for name in FOUND if "clip_detr" not in name]
TABLE_4 = {  # priors, contrast, score, focal loss
    "cckt_similarity_r18": (False, "none", "similarity", "both"),  # the control of the two with a contrast
    "cckt_priors_r18": (True, "none", "class", "class"),
    "cckt_full_class_r18": (True, "instance", "class", "both"),
    "cckt_contrast_r18": (False, "instance", "similarity", "both"),
    "cckt_full_r18": (True, "instance", "similarity", "both"),
}


def test_all_with_cckt_are_found_by_their_name():
    """Beside those with a part of CLIP-DETR, which test_clip_detr_configs.py builds."""
    enabled = {name for name, model in detr_models().items() if model.get("CCKT", {}).get("ENABLED", False)}
    assert set(FOUND) == enabled and set(NAMES) == {name for name in enabled if "clip_detr" not in name} and NAMES


@pytest.mark.parametrize("name", NAMES)
def test_narrowed_it_builds_and_detects(name):
    cfg, model = built(name, *NARROW)
    assert model.cckt.priors is None or model.cckt.priors.assignment == (
        "interleave" if name.startswith("ovshapes") else "blocks"
    )
    found = rates(cfg, model)
    assert all(found[f"cckt.{key}"][0] == cfg.SOLVER.BASE_LR for key, _ in model.cckt.named_parameters())
    with torch.no_grad():
        outputs = model.eval()(samples())
    assert all(0 < len(output["instances"]) <= cfg.TEST.DETECTIONS_PER_IMAGE for output in outputs)


@pytest.mark.parametrize("name", TABLE_4)
def test_rows_of_table_4_differ_in_nothing_else(name):
    cfg = load_config(f"ovshapes/{name}.yaml")
    plain = load_config("ovshapes/detr_text_r18.yaml")
    cckt, whole = cfg.MODEL.CCKT, load_config("ovshapes/cckt_full_r18.yaml").MODEL.CCKT
    assert (cckt.PRIORS, cckt.CONTRAST, cckt.SCORE, cckt.CLASS_LOSS_ON) == TABLE_4[name]
    assert bool(cfg.MODEL.CCKT.PRIOR_FILE) == cfg.MODEL.CCKT.PRIORS
    assert bool(cfg.MODEL.CCKT.REGION_CACHE) == (cfg.MODEL.CCKT.CONTRAST != "none")
    for key in ("PRIORS", "CONTRAST", "SCORE", "CLASS_LOSS_ON", "PRIOR_FILE", "REGION_CACHE"):
        cckt[key] = whole[key]
    assert cckt == whole
    cfg.MODEL.CCKT, cfg.OUTPUT_DIR = plain.MODEL.CCKT, plain.OUTPUT_DIR
    cfg.TEST.EXPECTED_RESULTS = plain.TEST.EXPECTED_RESULTS
    assert cfg.dump() == plain.dump()
