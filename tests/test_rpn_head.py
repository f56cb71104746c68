"""The RPN head with norms: values against float64, what is shared by the levels, and the head without norms."""

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead, build_rpn_head
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.modeling import NormalizedRPNHead, OpenVocabularyRCNN, OpenVocabularyRPN
from tests import micro

LEVELS = [ShapeSpec(channels=16, stride=stride) for stride in (4, 8, 16, 32, 64)]
SIZES = ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))


def cfg(**keys):
    config = micro.cfg()
    config.merge_from_list([part for key, value in keys.items() for part in (f"MODEL.RPN.{key}", value)])
    return config


def head(**keys):
    """A head of two convolutions, with deterministic weights; norms are not those of the start."""
    network = build_rpn_head(cfg(**keys), LEVELS)
    with torch.no_grad():
        for number, (name, tensor) in enumerate(network.state_dict().items()):
            if tensor.is_floating_point():
                wave = micro.wave(tensor.shape, 0.3 + 0.01 * number)
                positive = tensor.ndim == 1 and not name.endswith(("bias", "mean"))  # scales and variances
                tensor.copy_(1 + 0.4 * wave if positive else 0.3 * wave)
    return network


def maps():
    return [micro.wave((2, 16, *size), 0.4 + 0.1 * level) for level, size in enumerate(SIZES)]


def stated(network, features, level, training):
    """Logits and deltas of a level in float64: convolution, batch norm with eps 1e-5, ReLU, twice; then two 1x1."""
    hidden = features.double()
    for conv, norms in zip(network.conv, network.norms):
        hidden = F.conv2d(hidden, conv.weight.double(), padding=1)
        norm = norms[min(level, len(norms) - 1)]
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        if training:
            mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), correction=0)
        hidden = (hidden - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        hidden = (hidden * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]).clamp(min=0)
    outputs = (network.objectness_logits, network.anchor_deltas)
    return [F.conv2d(hidden, out.weight.double(), out.bias.double()) for out in outputs]


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("per_level", [True, False])
def test_equals_float64_reference(per_level, training):
    """In training a shared batch norm uses the statistics of each level by itself, as separate ones do."""
    network = head(NORM="BN", NORM_PER_LEVEL=per_level).train(training)
    assert [len(norms) for norms in network.norms] == [5 if per_level else 1] * 2
    before = copy.deepcopy(network)
    for level, found in enumerate(zip(*network(maps()))):
        for value, expected in zip(found, stated(before, maps()[level], level, training), strict=True):
            assert torch.allclose(value.double(), expected, atol=1e-5), level


@torch.no_grad()
def test_levels_have_separate_norms():
    """A changed norm of one level changes the outputs of that level only; a shared one changes all."""
    for per_level, changed in ((True, [False, True, False, False, False]), (False, [True] * 5)):
        network = head(NORM="BN", NORM_PER_LEVEL=per_level).eval()
        before, _ = network(maps())
        network.norms[0][1 if per_level else 0].running_mean += 1
        after, _ = network(maps())
        assert [not torch.equal(*pair) for pair in zip(before, after, strict=True)] == changed


def test_without_norm_it_is_the_standard_head():
    """Weights by name, random numbers of the start, and outputs: old checkpoints load and old runs repeat."""
    for dims in ([-1], [-1, -1]):
        heads = []
        for name in ("NormalizedRPNHead", "StandardRPNHead"):
            torch.manual_seed(0)
            heads.append(build_rpn_head(cfg(HEAD_NAME=name, CONV_DIMS=dims), LEVELS))
        ours, theirs = heads
        assert type(ours) is NormalizedRPNHead and type(theirs) is StandardRPNHead
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for found, expected in zip(ours(maps()), theirs(maps()), strict=True):
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_one_convolution_has_one_norm():
    network = head(NORM="BN", CONV_DIMS=[-1])
    assert [len(norms) for norms in network.norms] == [5] and network.conv.bias is None
    assert [tuple(level.shape) for level in network(maps())[1]] == [(2, 12, *size) for size in SIZES]


def test_a_detector_trains_the_norms():
    config = micro.cfg()
    config.MODEL.RPN.NORM = "BN"
    network = micro.model(config=config)
    rpn_head = network.proposal_generator.rpn_head
    with EventStorage():
        sum(network.train()(micro.images(2)).values()).backward()
    assert all(parameter.grad is not None for parameter in rpn_head.parameters())
    assert len(rpn_head.norms[0]) == 5 and all(norm.num_batches_tracked == 1 for norm in rpn_head.norms[0])


def test_a_head_that_would_ignore_the_norm_is_refused():
    with pytest.raises(UsageError, match="StandardRPNHead.*MODEL.RPN.NORM.*NormalizedRPNHead"):
        OpenVocabularyRCNN(cfg(NORM="BN", HEAD_NAME="StandardRPNHead"), vocabulary=micro.vocabulary())


def rpn_losses(average, labels, deltas):
    """loss_rpn_loc of two levels of 4 and 2 anchors in two images; a weight of 1/9 makes Detectron2's smooth L1 Huber."""
    config = cfg(BBOX_REG_AVERAGE=average, SMOOTH_L1_BETA=1 / 9, BBOX_REG_LOSS_WEIGHT=1 / 9)
    config.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 3
    shapes = {f"p{level}": shape for level, shape in enumerate(LEVELS, 2)}
    rpn = build_proposal_generator(config, shapes)
    assert isinstance(rpn, OpenVocabularyRPN)
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(6, 1)
    anchors = [Boxes(boxes[:4]), Boxes(boxes[4:])]
    logits = [torch.zeros(2, 4), torch.zeros(2, 2)]
    with EventStorage():
        found = rpn.losses(anchors, logits, list(labels), [deltas[:, :4], deltas[:, 4:]], [boxes, boxes])
    return found["loss_rpn_loc"].item()


@pytest.mark.parametrize("rows", [[], [(0, 0)], [(0, 1), (1, 5)], [(0, 0), (0, 1), (1, 2), (1, 4), (0, 5)]])
def test_box_loss_per_level_equals_float64_reference(rows):
    """Huber with delta 1/9, mean over the coordinates of positive anchors of a level, summed over levels. Targets are 0."""
    labels = torch.zeros(2, 6, dtype=torch.int8)
    for image, anchor in rows:
        labels[image, anchor] = 1
    deltas = 0.5 * micro.wave((2, 6, 4), 0.9)
    size = deltas.double().abs()
    huber = torch.where(size < 1 / 9, 0.5 * size**2, (size - 0.5 / 9) / 9)
    expected = 0.0
    for level in (slice(0, 4), slice(4, 6)):
        chosen = huber[:, level][labels[:, level] == 1]
        expected += chosen.mean().item() if len(chosen) else 0.0
    assert rpn_losses("positives_per_level", labels, deltas) == pytest.approx(expected, rel=1e-5)
    whole = huber[labels == 1].sum().item() / (3 * 2)
    assert rpn_losses("sampled", labels, deltas) == pytest.approx(whole, rel=1e-5)


def test_sampled_is_detectron2s_rpn():
    config, batch = micro.cfg(), micro.images(2)
    from tests.test_rcnn import losses

    config.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    assert losses(micro.model(config=config), batch) == losses(micro.model(), batch)
    with pytest.raises(UsageError, match="BBOX_REG_AVERAGE is 'all': choose one of sampled, positives_per_level"):
        rpn_losses("all", torch.zeros(2, 6), torch.zeros(2, 6, 4))
