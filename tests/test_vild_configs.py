"""The configurations of ViLD: the network and the losses of its release at full scale, the measured form on OV-Shapes."""

from pathlib import Path

import pytest
import torch
import yaml

from ovdet2.config import load_config
from ovdet2.modeling import OpenVocabularyRCNN
from tests import micro

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FULL = sorted(
    f"{data}/{path.name}" for data in ("ovcoco", "ovlvis") for path in (CONFIGS / data).glob("*.yaml")
    if path.name.startswith(("vild", "federated"))
)  # fmt: skip
ROWS = sorted(f"ovshapes/{path.name}" for path in (CONFIGS / "ovshapes").glob("vild*.yaml"))
ROWS += ["ovshapes/closed_set_r18.yaml", "ovshapes/clip_on_crops_r18.yaml", "ovshapes/federated_lvis_r18.yaml"]


@pytest.mark.parametrize("name", FULL)
def test_network_of_the_release(name):
    """Batch norm in FPN, RPN, box head and mask head, after the FCs too; p6 a convolution; anchors in the middle of a cell."""
    model = load_config(name).MODEL
    assert (model.FPN.FORM, model.FPN.NORM, model.RPN.NORM, model.RPN.NORM_PER_LEVEL) == (
        *("output_norm", "SyncBN", "SyncBN", True),
    )
    box, mask = model.ROI_BOX_HEAD, model.ROI_MASK_HEAD
    assert (box.NAME, box.NORM, box.FC_NORM) == ("NormalizedBoxHead", "SyncBN", "SyncBN")
    assert (mask.NAME, mask.NORM) == ("NormalizedMaskHead", "SyncBN")
    assert model.ROI_HEADS.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"] and model.ANCHOR_GENERATOR.OFFSET == 0.5


@pytest.mark.parametrize("name", FULL)
def test_box_losses_of_the_release(name):
    """Huber: delta 1 over the coordinates of positives; in the RPN delta 1/9, a ninth of smooth L1 with beta 1/9."""
    model = load_config(name).MODEL
    assert (model.ROI_BOX_HEAD.SMOOTH_L1_BETA, model.ROI_BOX_HEAD.BBOX_REG_AVERAGE) == (1.0, "positives")
    assert model.RPN.SMOOTH_L1_BETA == pytest.approx(1 / 9, abs=1e-4)
    assert model.RPN.BBOX_REG_LOSS_WEIGHT == pytest.approx(1 / 9, abs=1e-4)
    assert model.RPN.BBOX_REG_AVERAGE == "positives_per_level"
    error = torch.linspace(-0.5, 0.5, 21).double()
    huber = torch.where(error.abs() < 1 / 9, 0.5 * error**2, (error.abs() - 0.5 / 9) / 9)
    from fvcore.nn import smooth_l1_loss

    assert torch.allclose(smooth_l1_loss(error, torch.zeros(21).double(), 1 / 9) / 9, huber)


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_keep_the_form_in_which_they_were_measured(name):
    model = load_config(name).MODEL
    assert (model.BACKBONE.NAME, model.FPN.FORM, model.FPN.NORM) == ("build_resnet_fpn_backbone", "detectron2", "BN")
    assert (model.RPN.NORM, model.ROI_BOX_HEAD.NORM, model.ROI_BOX_HEAD.FC_NORM, model.ROI_MASK_HEAD.NORM) == ("",) * 4
    assert (model.ROI_BOX_HEAD.NAME, model.ROI_MASK_HEAD.NAME) == ("FastRCNNConvFCHead", "MaskRCNNConvUpsampleHead")
    assert (model.ROI_BOX_HEAD.BBOX_REG_AVERAGE, model.RPN.BBOX_REG_LOSS_WEIGHT) == ("sampled", 1.0)
    assert model.RPN.BBOX_REG_AVERAGE == "sampled"
    assert model.ROI_HEADS.IN_FEATURES == ["p2", "p3", "p4", "p5"] and model.ANCHOR_GENERATOR.OFFSET == 0.0


def test_image_rows():
    """The release ranks ViLD-image without objectness; with it is a row of its own."""
    for name in (*FULL, *ROWS):
        if "vild_image" in name:
            use = "only_objectness" if "objectness" in name else "only"
            assert load_config(name).MODEL.OVD.SECONDARY_USE == use, name


def test_ensembles_are_fused_as_published_unless_their_name_says_otherwise():
    found = {name: load_config(name).MODEL.OVD.SECONDARY_BACKGROUND for name in (*FULL, *ROWS) if "ensemble" in name}
    expected = {name: next((kind for kind in ("text", "objectness") if f"_{kind}_" in name), "none") for name in found}
    assert found == expected and set(found.values()) == {"none", "text", "objectness"}


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_the_form_of_the_release_trains_and_detects(norm):
    """The whole network at micro size, with the norms that need no group of processes."""
    config = micro.cfg()
    form = yaml.safe_load((CONFIGS / "base" / "vild_fpn.yaml").read_text())["MODEL"]
    for group, key in (("FPN", "FORM"), ("RPN", "NORM_PER_LEVEL"), ("ROI_BOX_HEAD", "NAME"), ("ROI_MASK_HEAD", "NAME"), ("ROI_HEADS", "IN_FEATURES"), ("BACKBONE", "NAME")):  # fmt: skip
        config.MODEL[group][key] = form[group][key]
    config.MODEL.FPN.OUT_CHANNELS = config.MODEL.ROI_BOX_HEAD.CONV_DIM = 32  # GN has 32 groups
    for group, key in (("FPN", "NORM"), ("RPN", "NORM"), ("ROI_BOX_HEAD", "NORM"), ("ROI_BOX_HEAD", "FC_NORM")):
        config.MODEL[group][key] = norm
    network = micro.model(config=config)
    assert isinstance(network, OpenVocabularyRCNN)
    batch = micro.images(2)
    network.train()
    from detectron2.utils.events import EventStorage

    with EventStorage():
        sum(network(batch).values()).backward()
    lacking = [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None]
    assert not lacking, lacking
    with torch.no_grad():
        assert len(network.eval()(batch)[0]["instances"])
