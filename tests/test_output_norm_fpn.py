"""The pyramid and the mask head of the F-VLM release, against statements in float64."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead, build_mask_head
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.modeling import NormalizedMaskHead, OpenVocabularyRCNN
from ovdet2.modeling.backbone.clip_pyramid import GivenMaps, build_fpn
from tests import micro

NAMES = ("res2", "res3", "res4", "res5")
CHANNELS = {"res2": 3, "res3": 5, "res4": 6, "res5": 7}


def fpn(form="output_norm", norm="BN", out=8):
    """An FPN with deterministic weights in evaluation mode; norms are not those of the start."""
    config = micro.cfg()
    config.MODEL.FPN.FORM, config.MODEL.FPN.NORM, config.MODEL.FPN.OUT_CHANNELS = form, norm, out
    shapes = {name: ShapeSpec(channels=CHANNELS[name], stride=4 * 2**level) for level, name in enumerate(NAMES)}
    network = build_fpn(config, GivenMaps(shapes))
    randomise(network)
    return network.eval()


def randomise(network):
    with torch.no_grad():
        for number, (name, tensor) in enumerate(network.state_dict().items()):
            if tensor.is_floating_point():
                wave = micro.wave(tensor.shape, 0.3 + 0.01 * number)
                positive = tensor.ndim == 1 and not name.endswith(("bias", "mean"))
                tensor.copy_(1 + 0.4 * wave if positive else 0.5 * wave)


def maps(height, width):
    sides = {name: (height >> level, width >> level) for level, name in enumerate(NAMES)}
    return {name: micro.wave((2, CHANNELS[name], *sides[name]), 0.4 + 0.01 * sides[name][0]) for name in NAMES}


def batch_norm(values, norm):
    """Of evaluation mode, eps 1e-5."""
    mean, variance, weight, bias = (
        getattr(norm, name).double()[:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    return (values - mean) / (variance + 1e-5).sqrt() * weight + bias


def convolution_p6(p5, weight):
    """3x3, stride 2, by loops over the cells: of an even side the window of cell i is 2i to 2i + 2, of an odd side it is
    2i - 1 to 2i + 1, and cells outside are zero."""
    height, width = p5.shape[-2:]
    rows, columns = -(-height // 2), -(-width // 2)
    out = p5.new_zeros((len(p5), len(weight), rows, columns))
    for row in range(rows):
        for column in range(columns):
            for y in range(3):
                for x in range(3):
                    at = 2 * row + y - height % 2, 2 * column + x - width % 2
                    if 0 <= at[0] < height and 0 <= at[1] < width:
                        out[:, :, row, column] += p5[:, :, at[0], at[1]] @ weight[:, :, y, x].T
    return out


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 48), (40, 24)])  # p5 of 4 x 6 and 5 x 3 cells
def test_pyramid_equals_float64_reference(size):
    """Laterals without norm, summed from the top; the norm after the 3x3 convolutions; p6 from p5 before its norm."""
    network, given = fpn(), maps(*size)
    found = network(given)
    state = {name: tensor.double() for name, tensor in network.state_dict().items()}
    laterals = [
        F.conv2d(given[name].double(), state[f"fpn_lateral{level}.weight"]) for level, name in enumerate(NAMES, 2)
    ]
    for level in (2, 1, 0):
        laterals[level] = laterals[level] + laterals[level + 1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    plain = [F.conv2d(laterals[k], state[f"fpn_output{k + 2}.weight"], padding=1) for k in range(4)]
    plain.append(convolution_p6(plain[3], state["top_block.conv.weight"]))
    assert list(found) == ["p2", "p3", "p4", "p5", "p6"]
    for level, values in zip(found, plain, strict=True):
        expected = batch_norm(values, network.norms[level])
        torch.testing.assert_close(found[level].double(), expected, rtol=1e-4, atol=1e-4)
        assert found[level].shape[1] == network.output_shape()[level].channels == 8


def test_where_the_norms_and_the_biases_are():
    """With a norm no convolution has a bias; without one all have, and there is nothing to normalise."""
    names = set(fpn().state_dict())
    assert not [name for name in names if name.startswith("fpn_") and not name.endswith(".weight")]
    assert not [name for name in names if "fpn_" in name and "norm" in name] and "top_block.conv.bias" not in names
    plain = set(fpn(norm="").state_dict())
    levels = [f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in range(2, 6)] + ["top_block.conv"]
    assert plain == {f"{name}.{part}" for name in levels for part in ("weight", "bias")}


def test_all_of_it_is_trained():
    network = fpn().train()
    sum(level.square().mean() for level in network({k: v + 0 for k, v in maps(32, 48).items()}).values()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_other_form_is_detectron2s():
    network = fpn("detectron2")
    assert type(network) is FPN
    found = network(maps(32, 48))
    assert torch.equal(found["p6"], found["p5"][:, :, ::2, ::2]) and network.fpn_lateral2.norm is not None


def test_forms_that_are_refused():
    with pytest.raises(UsageError, match='FPN.FORM is \'other\': choose "detectron2" or "output_norm"'):
        fpn("other")
    config = micro.cfg()
    config.MODEL.FPN.FORM = "output_norm"
    with pytest.raises(UsageError, match="FPN.FORM is 'output_norm', which build_resnet_fpn_backbone does not read"):
        OpenVocabularyRCNN(config, vocabulary=micro.vocabulary())


def mask_head(norm):
    config = micro.cfg()
    config.MODEL.ROI_MASK_HEAD.NAME, config.MODEL.ROI_MASK_HEAD.NORM = "NormalizedMaskHead", norm
    config.MODEL.ROI_MASK_HEAD.NUM_CONV, config.MODEL.ROI_MASK_HEAD.CONV_DIM = 2, 32 if norm == "GN" else 6
    network = build_mask_head(config, ShapeSpec(channels=5, height=4, width=4))
    randomise(network)
    return network.eval()


@torch.no_grad()
def test_mask_head_equals_float64_reference():
    """Convolution, norm, ReLU, twice; transposed convolution, norm, ReLU; 1x1 convolution."""
    network, values = mask_head("BN"), micro.wave((3, 5, 4, 4), 0.37)
    assert isinstance(network, NormalizedMaskHead) and network.deconv.bias is None
    found = network.layers(values)
    hidden = values.double()
    for conv in (network.mask_fcn1, network.mask_fcn2):
        hidden = batch_norm(F.conv2d(hidden, conv.weight.double(), padding=1), conv.norm).clamp(min=0)
    weight = network.deconv.weight.double()  # [in, out, 2, 2]: each cell becomes 2 x 2
    up = torch.einsum("nihw,ioyx->nohywx", hidden, weight).flatten(4).flatten(2, 3)
    hidden = batch_norm(up, network.deconv_relu[0]).clamp(min=0)
    expected = F.conv2d(hidden, network.predictor.weight.double(), network.predictor.bias.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (3, 1, 8, 8)


def test_mask_head_without_norm_is_detectron2s():
    network = mask_head("")
    shape = ShapeSpec(channels=5, height=4, width=4)
    plain = MaskRCNNConvUpsampleHead(shape, num_classes=1, conv_dims=[6, 6, 6])
    plain.load_state_dict(network.state_dict())
    values = micro.wave((3, 5, 4, 4), 0.37)
    assert torch.equal(network.layers(values), plain.layers(values))


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN", ""])
def test_mask_head_without_regions(norm):
    """A step may have no foreground region: statistics stay, and every parameter has a gradient, as DDP requires."""
    network = mask_head(norm).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items() if "running" in name}
    logits = network.layers(torch.zeros(0, 5, 4, 4))
    assert logits.shape == (0, 1, 8, 8)
    (logits.sum() * 0).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) and bool(before) == norm.endswith(
        "BN"
    )
    assert all(module.training for module in network.modules())
