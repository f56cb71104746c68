"""The configurations of CCKT-Det: each builds, detects, and has the parts that its row of the table says."""

import shlex
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


PUBLISHED = {  # the same rows with the class branch of the published code: priors, contrast, score
    "cckt_priors_published_r18": (True, "none", "class"),
    "cckt_full_class_published_r18": (True, "instance", "class"),
    "cckt_contrast_published_r18": (False, "instance", "similarity"),
    "cckt_full_published_r18": (True, "instance", "similarity"),
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_differ_from_ours_in_class_branch_and_its_loss(name):
    cfg, ours = load_config(f"ovshapes/{name}.yaml"), load_config("ovshapes/cckt_full_r18.yaml")
    cckt = cfg.MODEL.CCKT
    assert (cckt.PRIORS, cckt.CONTRAST, cckt.SCORE) == PUBLISHED[name]
    assert (cfg.MODEL.OVD.CLASSIFIER, cckt.CLASS_LOSS_ON, cckt.SIMILARITY_BIAS) == ("closed_set", "class", 0.0)
    assert bool(cckt.PRIOR_FILE) == cckt.PRIORS and bool(cckt.REGION_CACHE) == (cckt.CONTRAST != "none")
    for key in ("PRIORS", "CONTRAST", "SCORE", "PRIOR_FILE", "REGION_CACHE", "CLASS_LOSS_ON", "SIMILARITY_BIAS"):
        cckt[key] = ours.MODEL.CCKT[key]
    cfg.MODEL.OVD.CLASSIFIER, cfg.OUTPUT_DIR = ours.MODEL.OVD.CLASSIFIER, ours.OUTPUT_DIR
    cfg.TEST.EXPECTED_RESULTS = ours.TEST.EXPECTED_RESULTS
    assert cfg.dump() == ours.dump()


def test_the_published_form_in_the_header_of_ov_coco_is_a_configuration():
    """Closed class branch, raw features, one crop of each class, and neck and words at a tenth of the rate."""
    header = (CONFIGS / "ovcoco" / "cckt_r50.yaml").read_text(encoding="utf-8").split("_BASE_")[0]
    lines = [line.removeprefix("#").strip() for line in header.splitlines()]
    words = shlex.split(" ".join(line for line in lines if line.startswith(("MODEL.OVD.CLASSIFIER", "SOLVER."))))
    cfg, model = built("ovcoco/cckt_r50.yaml", *NARROW, *words)
    assert (cfg.MODEL.CCKT.CONTRAST, model.cckt.contrast_temperature) == ("class", pytest.approx(0.07 / 20))
    assert {type(branch).__name__ for branch in model.network.class_branches} == {"ClosedSetBranch"}
    found = rates(cfg, model)
    slow = {name for name, (rate, _) in found.items() if rate == pytest.approx(cfg.SOLVER.BASE_LR / 10)}
    assert {name for name in found if ".neck." in name or ".priors." in name} < slow
    assert not any(".heads." in name or ".class_branches." in name for name in slow)


@torch.no_grad()
def test_the_published_class_branch_does_not_read_words_and_the_similarity_does():
    """Rows 3 and 5 can therefore differ: the text branch of our rows reads the words, as the similarity does."""

    def change(name):
        """Largest change of a detection score if the embeddings of the words change their places."""
        model = built(name, *NARROW, "MODEL.CCKT.PRIORS", "False")[1].eval()  # priors read words, too
        for head in (*model.cckt.heads, *model.network.class_branches):
            torch.nn.init.normal_(head.projection.weight if hasattr(head, "projection") else head.weight)
        scores = []
        for _ in range(2):
            scores.append(model(samples(1))[0]["instances"].scores)
            model.cckt.bank.embeddings.copy_(model.cckt.bank.embeddings.roll(1, dims=1))
        return (scores[0] - scores[1]).abs().max().item()

    assert change("ovshapes/cckt_full_class_published_r18.yaml") == 0
    for name in ("cckt_full_published_r18", "cckt_full_class_r18", "cckt_full_r18"):
        assert change(f"ovshapes/{name}.yaml") > 1e-3, name
