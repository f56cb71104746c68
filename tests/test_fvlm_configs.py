"""The full-scale F-VLM and F-ViT have the settings of the releases, or scale them by the linear rule."""

from pathlib import Path

import pytest
import yaml

from ovdet2.config import load_config
from ovdet2.modeling import FrozenVLMRCNN

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS))
    for folder in ("ovcoco", "ovlvis")
    for kind in ("fvlm", "fvit")
    for path in (CONFIGS / folder).glob(f"{kind}*.yaml")
)
# Fusion exponents of base and novel words, weight of the background, 1 / CLIP's temperature; images of a step and
# learning rate of the release (F-VLM's on COCO are not known: those on LVIS).
FVLM_LVIS, FVIT_COCO, FVIT_LVIS = (256, 0.36), (64, 1e-4), (128, 4e-4)
CARDS = {
    "ovcoco/fvlm_rn50.yaml": (0.2, 0.45, 0.9, 100, FVLM_LVIS),
    "ovlvis/fvlm_rn50.yaml": (0.35, 0.65, 0.9, 100, FVLM_LVIS),
    "ovlvis/fvlm_rn50x4.yaml": (0.35, 0.65, 0.9, 100, FVLM_LVIS),
    "ovlvis/fvlm_rn50x64.yaml": (0.35, 0.65, 0.9, 100, FVLM_LVIS),
    "ovcoco/fvit_b16.yaml": (0.1, 0.8, 0.6, 75, FVIT_COCO),
    "ovlvis/fvit_b16.yaml": (0.35, 0.65, 0.9, 50, FVIT_LVIS),
}


def test_all_of_them_are_in_the_table():
    assert set(NAMES) - set(CARDS) == {"ovcoco/fvlm_rn50_detector.yaml"}


@pytest.mark.parametrize("name", CARDS)
def test_settings_of_the_releases(name):
    cfg = load_config(name)
    base, novel, background, temperature, (images, rate) = CARDS[name]
    ovd = cfg.MODEL.OVD
    assert (ovd.FUSION_BASE, ovd.FUSION_NOVEL, ovd.BACKGROUND_WEIGHT) == (base, novel, background)
    assert 1 / cfg.MODEL.FVLM.TEMPERATURE == pytest.approx(temperature, rel=1e-3)
    assert ovd.FUSION_RENORMALIZE == ("fvlm" in name) and cfg.SOLVER.OPTIMIZER == ("SGD" if "fvlm" in name else "AdamW")
    assert cfg.SOLVER.BASE_LR / cfg.SOLVER.IMS_PER_BATCH == pytest.approx(rate / images)
    assert cfg.MODEL.VOCABULARY.TEMPLATES == ("openclip80" if "fvlm" in name else "vild63")
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 5 and cfg.MODEL.MASK_ON == name.startswith("ovlvis")


# F-ViT by CLIM's code: epochs, epochs of the drops, NMS, weight decay, norm of clipped gradients; images of an epoch.
FVIT = {
    "ovcoco/fvit_b16.yaml": (3, (), 0.4, 0.1, 1.0, 107_761),
    "ovlvis/fvit_b16.yaml": (48, (32, 44), 0.5, 0.05, 35.0, 100_170),
}


@pytest.mark.parametrize("name", FVIT)
def test_schedule_of_clim(name):
    cfg = load_config(name)
    epochs, drops, nms, decay, clip, images = FVIT[name]
    solver, epoch = cfg.SOLVER, cfg.SOLVER.MAX_ITER / epochs
    assert epoch == pytest.approx(images / solver.IMS_PER_BATCH, rel=1e-3)
    assert [step / epoch for step in solver.STEPS] == pytest.approx(list(drops), abs=1e-6) and solver.GAMMA == 0.1
    assert (cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST, solver.WEIGHT_DECAY) == (nms, decay)
    assert solver.CLIP_GRADIENTS.ENABLED and solver.CLIP_GRADIENTS.CLIP_VALUE == clip
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (250, 0.001)
    rpn = cfg.MODEL.RPN
    assert (rpn.PRE_NMS_TOPK_TEST, rpn.POST_NMS_TOPK_TEST) == (2000 if "lvis" in name else 1000, 1000)


@pytest.mark.parametrize("name", NAMES)
def test_the_longest_edge_is_that_of_the_jitter(name):
    """An image is tested at the size that a scale of 1 gives it in training."""
    cfg = load_config(name)
    assert cfg.INPUT.LSJ.ENABLED and tuple(cfg.INPUT.LSJ.SCALES) == (0.1, 2.0)
    assert cfg.INPUT.MIN_SIZE_TEST == cfg.INPUT.MAX_SIZE_TEST == cfg.INPUT.LSJ.SIDE == (640 if "fvit" in name else 1024)


@pytest.mark.parametrize("name", [name for name in NAMES if "fvit" in name])
def test_the_second_command_of_a_header_keeps_the_results_of_the_first(name):
    cfg = load_config(name)
    assert f"OUTPUT_DIR {cfg.OUTPUT_DIR}_clim" in (CONFIGS / name).read_text()


@pytest.mark.parametrize("name", ["fvlm_resnet", "fvlm_vit", "fvlm_vit_clim"])
def test_rows_of_ov_shapes_fuse_the_scores_of_clip(name):
    """An empty group "OVD:" in a file replaced all of that group of its base by the defaults, without fusion."""
    ovd = load_config(f"ovshapes/{name}.yaml").MODEL.OVD
    assert (ovd.CLASSIFIER, ovd.SECONDARY_SCORES, ovd.SECONDARY_USE) == ("text_background", "map", "fuse")
    assert (ovd.FUSION_BASE, ovd.FUSION_NOVEL, ovd.FUSION_RENORMALIZE) == (0.35, 0.65, True)
    assert (ovd.TEMPERATURE, ovd.BACKGROUND_WEIGHT) == (0.05, 0.9)


# Of the release of F-VLM; of the code of CLIM and CLIPSelf (F-ViT); and of the rows of OV-Shapes, as they were measured.
FORMS = {
    "fvlm": ("output_norm", "SyncBN", "NormalizedMaskHead", "SyncBN", 0.5, 6, 1024),
    "fvit": ("detectron2", "", "MaskRCNNConvUpsampleHead", "SyncBN", 0.0, 5, 640),
    "ovshapes": ("detectron2", "", "MaskRCNNConvUpsampleHead", "", 0.0, 5, 0),
}
ROWS = [f"ovshapes/{path.name}" for path in sorted((CONFIGS / "ovshapes").glob("fvlm*.yaml"))]


@pytest.mark.parametrize("name", [*NAMES, *ROWS])
def test_form_of_the_network(name):
    """Norms of the FPN and p6, norms of the RPN and the mask head, anchors, levels that regions are pooled from, input."""
    cfg, kind = load_config(name), "ovshapes" if name in ROWS else name.split("/")[1][:4]
    model = cfg.MODEL
    heads, levels = (model.ROI_MASK_HEAD.NAME, model.ROI_MASK_HEAD.NORM), model.ROI_HEADS.IN_FEATURES
    found = (
        model.FPN.FORM,
        model.RPN.NORM,
        *heads,
        model.ANCHOR_GENERATOR.OFFSET,
        int(levels[-1][1:]),
        cfg.INPUT.SQUARE,
    )
    assert found == FORMS[kind] and levels == [f"p{level}" for level in range(2, found[5] + 1)]
    assert model.RPN.NORM_PER_LEVEL and model.FPN.NORM == model.ROI_BOX_HEAD.NORM == (
        "BN" if name in ROWS else "SyncBN"
    )
    assert model.CLIP_VIT.HALVE_CHANNELS == (kind == "ovshapes")
    box, released = model.ROI_BOX_HEAD, kind == "fvlm"
    assert (box.NAME, box.FC_NORM) == (("NormalizedBoxHead", "SyncBN") if released else ("FastRCNNConvFCHead", ""))
    assert box.BBOX_REG_AVERAGE == ("positives" if released else "sampled")
    assert model.RPN.BBOX_REG_LOSS_WEIGHT == (0.1111 if released else 1.0)
    beta = 0.0 if kind == "fvit" else 1.0
    assert (model.ROI_BOX_HEAD.SMOOTH_L1_BETA, model.RPN.SMOOTH_L1_BETA) == (beta, pytest.approx(beta / 9, abs=1e-4))


def weights_of(name):
    """Names and shapes of the weights of a detector but for CLIP's, on the embedded model."""
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.VOCABULARY.TEMPLATES", "single"]
    state = FrozenVLMRCNN(load_config(name, overrides)).state_dict()
    return {key: tuple(value.shape) for key, value in state.items() if not key.startswith("backbone.trunk.visual.")}


@pytest.mark.parametrize("name, count", [("ovshapes/fvlm_resnet.yaml", 90), ("ovshapes/fvlm_vit.yaml", 101)])
def test_checkpoints_of_the_rows_still_load(name, count):
    """Those of before the form of the release: Detectron2's FPN and RPN head, halved channels of the ViT."""
    found = weights_of(name)
    assert len(found) == count
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for level in range(2, 6):
        for part in ("lateral", "output"):
            assert all(f"backbone.pyramid.fpn_{part}{level}.norm.{value}" in found for value in norm)
    rpn = {key.removeprefix("proposal_generator.rpn_head.") for key in found if "rpn_head" in key}
    layers = ("conv.conv0", "conv.conv1", "objectness_logits", "anchor_deltas")
    assert rpn == {f"{layer}.{value}" for layer in layers for value in ("weight", "bias")}
    assert not any("top_block" in key or "pyramid.norms" in key for key in found)
    if "vit" in name:
        width = found["backbone.trunk.resample.res3.weight"][0]
        assert found["backbone.trunk.resample.res3.weight"][1] == width // 2
        assert found["backbone.trunk.resample.res2.3.weight"][:2] == (width // 2, width // 4)


def empty_groups(node, path=""):
    """Keys of a yaml file whose value is empty."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from empty_groups(value, f"{path}.{key}")
    elif node is None:
        yield path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_configuration_has_an_empty_group(path):
    assert not list(empty_groups(yaml.safe_load(path.read_text())))
