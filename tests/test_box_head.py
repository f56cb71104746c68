"""The box head of the releases: norms after the FCs, against float64; and the two averages of the box loss."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import build_box_head
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.modeling import NormalizedBoxHead, OpenVocabularyRCNN
from tests import micro

SHAPE = ShapeSpec(channels=4, height=3, width=3)


def head(conv_norm="BN", fc_norm="BN", fcs=2):
    config = micro.cfg()
    box = config.MODEL.ROI_BOX_HEAD
    box.NAME, box.NORM, box.FC_NORM, box.NUM_FC, box.FC_DIM = "NormalizedBoxHead", conv_norm, fc_norm, fcs, 6
    network = build_box_head(config, SHAPE)
    with torch.no_grad():
        for number, (name, tensor) in enumerate(network.state_dict().items()):
            if tensor.is_floating_point():
                wave = micro.wave(tensor.shape, 0.3 + 0.01 * number)
                positive = tensor.ndim == 1 and not name.endswith(("bias", "mean"))
                tensor.copy_(1 + 0.4 * wave if positive else 0.4 * wave)
    return network


def normed(x, state, name, training):
    """Batch norm of the rows of x [R, F] or of maps [R, C, H, W], eps 1e-5."""
    axes = (0,) if x.ndim == 2 else (0, 2, 3)
    mean, variance, weight, bias = (
        state[f"{name}.{key}"].double() for key in ("running_mean", "running_var", "weight", "bias")
    )
    if training:
        mean, variance = x.mean(axes), x.var(axes, correction=0)
    shape = (1, -1) if x.ndim == 2 else (1, -1, 1, 1)
    mean, variance, weight, bias = (value.reshape(shape) for value in (mean, variance, weight, bias))
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_equals_float64_reference(training):
    network = head().train(training)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pooled = micro.wave((5, 4, 3, 3), 0.7)
    x = F.conv2d(pooled.double(), state["conv1.weight"].double(), padding=1)
    x = normed(x, state, "conv1.norm", training).clamp(min=0).flatten(1)
    for layer in ("fc1", "fc2"):
        x = x @ state[f"{layer}.weight"].double().T + state[f"{layer}.bias"].double()
        x = normed(x, state, f"{layer}_norm.norm", training).clamp(min=0)
    assert torch.allclose(network(pooled).double(), x, atol=1e-5)


@torch.no_grad()
def test_without_norm_it_is_detectron2s_head():
    network = head("", "")
    plain = FastRCNNConvFCHead(SHAPE, conv_dims=[16], fc_dims=[6, 6])
    plain.load_state_dict(network.state_dict())
    pooled = micro.wave((5, 4, 3, 3), 0.7)
    assert torch.equal(plain(pooled), network(pooled))


@pytest.mark.parametrize(
    "norm, regions", [("BN", 0), ("BN", 1), ("SyncBN", 1)]
)  # Detectron2 refuses SyncBN without any
def test_few_regions_in_training(norm, regions):
    """As a second head may get: no region, or a single one, which has no batch statistics."""
    network = head(norm, norm).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if "fc1_norm" in name}
    out = network(micro.wave((regions, 4, 3, 3), 0.7))
    out.sum().backward()
    assert out.shape == (regions, 6) and out.isfinite().all()
    state = network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if "running" in name)
    if regions:
        conv = network.conv1(micro.wave((1, 4, 3, 3), 0.7)).flatten(1)
        first = network.fc1(conv).double()
        stated = normed(first, network.state_dict(), "fc1_norm.norm", training=False)
        assert torch.allclose(network.fc1_norm(first.float()).double(), stated, atol=1e-5)


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN"])
def test_other_norms(norm):
    config = micro.cfg()
    box = config.MODEL.ROI_BOX_HEAD
    box.NAME, box.FC_NORM, box.FC_DIM = "NormalizedBoxHead", norm, 32
    network = build_box_head(config, SHAPE)
    assert isinstance(network, NormalizedBoxHead) and network.output_shape.channels == 32
    out = network(micro.wave((5, 4, 3, 3), 0.7))
    out.sum().backward()
    assert out.shape == (5, 32) and all(parameter.grad is not None for parameter in network.parameters())
    order = [name for name, _ in network.named_children()]
    assert order[-4:] == ["fc_relu1", "fc2", "fc2_norm", "fc_relu2"] or order[-3:] == ["fc1", "fc1_norm", "fc_relu1"]


def test_a_norm_that_the_head_does_not_read():
    config = micro.cfg()
    config.MODEL.ROI_BOX_HEAD.FC_NORM = "BN"
    with pytest.raises(UsageError, match="FastRCNNConvFCHead, which does not read MODEL.ROI_BOX_HEAD.FC_NORM .BN"):
        OpenVocabularyRCNN.from_config(config, micro.vocabulary())


def box_loss(average, labels, deltas):
    config = micro.cfg()
    config.MODEL.ROI_BOX_HEAD.BBOX_REG_AVERAGE = average
    predictor = micro.model(config=config).roi_heads.box_predictor
    boxes = torch.tensor([[1.0, 1.0, 21.0, 21.0]]).repeat(len(labels), 1)
    return predictor.box_reg_loss(boxes, boxes, deltas, labels)


@pytest.mark.parametrize("positives", [0, 1, 2, 4, 8])
def test_averages_of_the_box_loss(positives):
    """Huber with delta 1, of offsets from an exact proposal: their target is 0. Base classes are 0 to 2, background 3."""
    labels = torch.tensor([0] * positives + [3] * (8 - positives))
    deltas = 2 * micro.wave((8, 4), 0.9)
    size = deltas[:positives].double().abs()
    huber = torch.where(size < 1, 0.5 * size**2, size - 0.5).sum().item()
    assert box_loss("sampled", labels, deltas).item() == pytest.approx(huber / 8, rel=1e-5)
    assert box_loss("positives", labels, deltas).item() == pytest.approx(huber / max(1, 4 * positives), rel=1e-5)
    if positives == 2:  # a quarter of the regions
        assert box_loss("positives", labels, deltas).item() == pytest.approx(box_loss("sampled", labels, deltas).item())


def test_an_unknown_average():
    with pytest.raises(UsageError, match="BBOX_REG_AVERAGE is 'all': choose one of sampled, positives"):
        box_loss("all", torch.tensor([0]), torch.zeros(1, 4))


def test_the_second_head_of_an_ensemble_is_like_the_first():
    config = micro.cfg()
    box = config.MODEL.ROI_BOX_HEAD
    box.NAME, box.NORM, box.FC_NORM = "NormalizedBoxHead", "BN", "BN"
    config.merge_from_list(
        ["MODEL.VILD.WEIGHT", 0.5, "MODEL.VILD.OWN_HEAD", True, "MODEL.OVD.SECONDARY_SCORES", "image"]
    )
    network = micro.model(config=config)
    first, second = network.roi_heads.box_head, network.vild.image_head.box_head
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in second.state_dict().items()}
    assert not set(map(id, first.parameters())) & set(map(id, second.parameters()))
    assert copy.deepcopy(network).eval()(micro.images(1))
