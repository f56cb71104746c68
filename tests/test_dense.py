"""Dense features: parity with open_clip's whole-image path and with definitions in float64."""

import json
import math

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.vlm.attention_pool import attention_pool, attention_pool_regions
from ovdet2.vlm.dense import (
    attention_free_block,
    block_tokens,
    dense_map,
    embed_regions_dense,
    is_vit,
    pool_regions,
    positional_embedding,
    resized_shape,
    stride_of,
)
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher
from tests import micro

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "dense-vit": {
        "image_size": 224,
        "layers": 3,
        "width": 48,
        "head_width": 16,
        "patch_size": 16,
        "ls_init_value": 0.3,
    },
    "dense-vit-one": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "dense-resnet": {"image_size": 224, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
    "dense-coca": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "attentional_pool": True},
    "dense-qk-norm": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "qk_norm": True},
    "dense-mean": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "pool_type": "avg"},
    "dense-eva": {"image_size": 28, "timm_model_name": "eva02_tiny_patch14_224", "timm_proj": "linear"},
}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Name -> open_clip model with deterministic weights, none of them zero."""
    folder = tmp_path_factory.mktemp("dense")
    for name, vision in VISION.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}))
        open_clip.add_model_config(folder / f"{name}.json")
    return lambda name: randomise(open_clip.create_model(name)).eval()


def randomise(clip):
    """Biases, norms and batch statistics that matter: as open_clip builds them, most are 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in clip.visual.state_dict().items():
        if tensor.ndim == 1 and tensor.is_floating_point():
            near = 1.0 if "var" in name or name.endswith("weight") else 0.0
            tensor.copy_(near + 0.2 * torch.rand(tensor.shape, generator=generator))
    return clip


@pytest.fixture(scope="module")
def vit(build):
    return build("dense-vit").visual


@pytest.fixture(scope="module")
def resnet(build):
    return build("dense-resnet").visual


@pytest.fixture(scope="module", params=["dense-vit", "dense-resnet"])
def teacher(request, build):
    tokenizer = open_clip.get_tokenizer(request.param)
    return Teacher(build(request.param), tokenizer, Fingerprint(request.param, "test", "0" * 64))


def pixels_of(*shape, frequency=0.37):
    return micro.wave(shape, frequency)


def close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def whole_image_of_resnet(visual, pixels):
    """encode_image by way of the dense path: the last map and the attention pool over the whole image."""
    return attention_pool(visual.attnpool, dense_map(visual, pixels))


def whole_image_of_vit(visual, pixels):
    (tokens,) = block_tokens(visual, pixels, attention_free=False)
    return visual.ln_post(tokens[:, 0]) @ visual.proj


@torch.no_grad()
def test_resnet_map_and_pool_equal_encode_image(build):
    clip = build("dense-resnet")
    pixels = pixels_of(2, 3, 224, 224)
    expected = clip.encode_image(pixels)
    close(whole_image_of_resnet(clip.visual, pixels), expected)
    boxes = [torch.tensor([[0.0, 0.0, 224.0, 224.0]])] * 2
    close(pool_regions(clip.visual, dense_map(clip.visual, pixels), boxes), F.normalize(expected, dim=1))


@torch.no_grad()
def test_vit_class_token_equals_encode_image(build):
    clip = build("dense-vit")
    pixels = pixels_of(2, 3, 224, 224)
    close(whole_image_of_vit(clip.visual, pixels), clip.encode_image(pixels))


@torch.no_grad()
@pytest.mark.parametrize("name, path", [("RN50", whole_image_of_resnet), ("ViT-B-32", whole_image_of_vit)])
def test_real_architectures_equal_encode_image(name, path):
    torch.manual_seed(0)
    clip = randomise(open_clip.create_model(name)).eval()
    pixels = pixels_of(1, 3, 224, 224)
    close(path(clip.visual, pixels), clip.encode_image(pixels))


@torch.no_grad()
def test_attention_pool_equals_its_module(resnet):
    maps = pixels_of(5, 512, 7, 7)
    close(attention_pool(resnet.attnpool, maps), resnet.attnpool(maps))
    weights = {name: tensor.double() for name, tensor in resnet.attnpool.state_dict().items()}
    tokens = maps.double().flatten(2).mT
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + weights["positional_embedding"]
    q, k, v = (F.linear(tokens, weights[f"{n}_proj.weight"], weights[f"{n}_proj.bias"]) for n in "qkv")
    heads = [
        ((q[:, :1, s] @ k[..., s].mT) / math.sqrt(64)).softmax(-1) @ v[..., s]
        for s in (slice(start, start + 64) for start in range(0, 512, 64))
    ]
    pooled = F.linear(torch.cat(heads, -1)[:, 0], weights["c_proj.weight"], weights["c_proj.bias"])
    close(attention_pool(resnet.attnpool, maps), pooled)


@torch.no_grad()
def test_attention_free_block_equals_its_definition(vit):
    block = vit.transformer.resblocks[-1]
    tokens = pixels_of(2, 7, 48)
    w = {name: tensor.double() for name, tensor in block.state_dict().items()}
    x = tokens.double()

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    values = norm(x, "ln_1") @ w["attn.in_proj_weight"][-48:].T + w["attn.in_proj_bias"][-48:]
    x = x + w["ls_1.gamma"] * (values @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"])
    hidden = norm(x, "ln_2") @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    x = x + w["ls_2.gamma"] * (hidden @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"])
    close(attention_free_block(block, tokens), x)
    assert not torch.allclose(block(tokens).double(), x, atol=1e-3)


@torch.no_grad()
def test_dense_map_of_a_vit_is_its_last_block_without_attention(vit):
    pixels = pixels_of(2, 3, 64, 96)
    earlier, free = block_tokens(vit, pixels, blocks=(-2, 2))
    close(free, attention_free_block(vit.transformer.resblocks[-1], earlier))
    found = dense_map(vit, pixels)
    assert found.shape == (2, 24, 4, 6)
    close(found[1, :, 3, 1], vit.ln_post(free[1, 1 + 3 * 6 + 1]) @ vit.proj)
    kept = dense_map(vit, pixels, attention_free=False)
    close(kept[0, :, 0, 5], vit.ln_post(vit.transformer.resblocks[-1](earlier)[0, 1 + 5]) @ vit.proj)
    with pytest.raises(IndexError):
        block_tokens(vit, pixels, blocks=(3,))


@torch.no_grad()
def test_both_token_layouts_and_a_single_block(build):
    visual = build("dense-vit").visual
    pixels = pixels_of(2, 3, 48, 80)
    expected = [dense_map(visual, pixels), dense_map(visual, pixels, attention_free=False)]
    visual.transformer.batch_first = False
    for block in visual.transformer.resblocks:
        block.attn.batch_first = False
    close(dense_map(visual, pixels), expected[0])
    close(dense_map(visual, pixels, attention_free=False), expected[1])
    assert dense_map(build("dense-vit-one").visual, pixels).shape == (2, 24, 6, 10)


@torch.no_grad()
def test_positional_embedding(vit):
    assert positional_embedding(vit, (14, 14)) is vit.positional_embedding
    wide = positional_embedding(vit, (9, 20))
    assert wide.shape == (181, 48) and torch.equal(wide[0], vit.positional_embedding[0])
    table = vit.positional_embedding[1:].T.reshape(1, 48, 14, 14)
    expected = F.interpolate(table, (9, 20), mode="bicubic", align_corners=False)
    close(wide[1 + 4 * 20 + 13], expected[0, :, 4, 13])
    unchanged = F.interpolate(table, (14, 14), mode="bicubic", align_corners=False)
    close(unchanged[0].flatten(1).T, vit.positional_embedding[1:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense-vit", "dense-resnet"])
def test_batch_equals_singles(name, build):
    visual = build(name).visual
    pixels = pixels_of(3, 3, 96, 160)
    together = dense_map(visual, pixels)
    singles = torch.cat([dense_map(visual, image[None]) for image in pixels])
    close(together, singles)
    boxes = [
        torch.tensor([[3.0, 5.0, 90.0, 70.0]]),
        torch.zeros(0, 4),
        torch.tensor([[0.0, 0, 160, 96], [50, 9, 71, 40]]),
    ]
    rows = pool_regions(visual, together, boxes, batch_size=2)
    apart = [pool_regions(visual, single[None], [b]) for single, b in zip(singles, boxes)]
    close(rows, torch.cat(apart))
    assert rows.dtype == torch.float32
    assert pool_regions(visual, together, [boxes[1]] * 3).shape == (0, 24)


@torch.no_grad()
def test_vit_region_is_the_mean_of_its_unit_cells(vit):
    """A box on cell borders with one sample per cell; a normalised map is averaged, not the raw one."""
    found = dense_map(vit, pixels_of(1, 3, 64, 96))
    cells = F.normalize(found[0].double(), dim=0)[:, 1:3, 2:5].flatten(1)
    row = pool_regions(vit, found, [torch.tensor([[32.0, 16.0, 80.0, 48.0]])])
    close(row[0], F.normalize(cells.mean(1), dim=0))


@torch.no_grad()
def test_attention_pool_of_a_region_on_cell_borders_is_the_pool_of_its_cells(resnet):
    found = dense_map(resnet, pixels_of(1, 3, 320, 288))
    rois = torch.tensor([[0.0, 32.0, 64.0, 32.0 + 224, 64.0 + 224]])
    row = attention_pool_regions(resnet.attnpool, found, rois, 1 / 32)
    close(row, F.normalize(resnet.attnpool(found[:, :, 2:9, 1:8]), dim=1))


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 9), size=st.tuples(st.integers(20, 90), st.integers(20, 90)))
def test_region_embeddings(teacher, seed, count, size):
    """Permuting the boxes permutes the rows, a row depends on its own box alone, rows are unit, none is fine."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    corners = (torch.rand(count, 2, 2, generator=generator) * 1.2 - 0.1) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    rows = embed_regions_dense(teacher, image, boxes, side=64, batch_size=4)
    assert rows.shape == (count, 24) and rows.dtype == torch.float32
    if count:
        close(rows.norm(dim=1), torch.ones(count))
        order = torch.randperm(count, generator=generator)
        close(embed_regions_dense(teacher, image, boxes[order], side=64), rows[order])
        close(embed_regions_dense(teacher, image, boxes[:1], side=64), rows[:1])


def test_degenerate_boxes_give_unit_rows(teacher):
    """Empty boxes and boxes outside the image are at least a pixel of it, wherever they lie."""
    boxes = torch.tensor([[50.0, 30.0, 50.0, 30.0], [-20.0, -9.0, -5.0, -1.0], [400.0, 300.0, 500.0, 400.0]])
    rows = embed_regions_dense(teacher, torch.randint(256, (3, 61, 107), dtype=torch.uint8), boxes, side=200)
    close(rows.norm(dim=1), torch.ones(3))


@torch.no_grad()
def test_boxes_scale_with_the_image(teacher):
    """At its own size the image is not resampled; elsewhere the boxes follow the two factors of the resize."""
    visual, image = teacher.clip.visual, ((micro.wave((3, 96, 160), 0.2) + 1) * 127.5).to(torch.uint8)
    boxes = torch.tensor([[10.0, 20.0, 80.0, 64.0]])
    pixels = ((image / 255 - teacher.mean) / teacher.std)[None]
    close(
        embed_regions_dense(teacher, image, boxes, side=160), pool_regions(visual, dense_map(visual, pixels), [boxes])
    )
    doubled = F.interpolate(image[None].float(), (192, 480), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)
    stride = stride_of(visual)
    shape = resized_shape(192, 480, 192, "shortest", stride)
    assert shape == (192, 480)
    stretched = boxes * torch.tensor([3.0, 2.0, 3.0, 2.0])
    pixels = ((doubled / 255 - teacher.mean) / teacher.std)[None]
    expected = pool_regions(visual, dense_map(visual, pixels), [stretched])
    close(embed_regions_dense(teacher, doubled, stretched, side=192, edge="shortest"), expected)


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(50, 75), (90, 44), (96, 96)])
def test_square_is_padded_with_black(teacher, height, width):
    """Longest edge to the side by one factor, as CLIM's evaluation; black is not the mean colour, and sizes are not
    rounded to the stride."""
    visual, side = teacher.clip.visual, 96
    image = ((micro.wave((3, height, width), 0.2) + 1) * 127.5).to(torch.uint8)
    boxes, scale = torch.tensor([[3.0, 5.0, 40.0, 41.0], [0.0, 0.0, 44.0, 50.0]]), side / max(height, width)
    shape = round(height * scale), round(width * scale)
    resized = F.interpolate(image[None] / 255, shape, mode=teacher.interpolation, antialias=True).clamp(0, 1)
    canvas = torch.zeros(1, 3, side, side)
    canvas[:, :, : shape[0], : shape[1]] = resized
    expected = pool_regions(visual, dense_map(visual, (canvas - teacher.mean) / teacher.std), [boxes * scale])
    close(embed_regions_dense(teacher, image, boxes, side=side, square=True), expected)
    tight = embed_regions_dense(teacher, image, boxes, side=side)
    assert torch.allclose(tight, expected, atol=1e-4) or height != width
    if is_vit(visual):  # its positional embeddings depend on the square
        assert ((tight * expected).sum(1) < 0.9999).all() == (height != width)


def test_squares_that_are_refused(teacher):
    image, boxes = torch.zeros(3, 40, 60, dtype=torch.uint8), torch.tensor([[3.0, 5.0, 40.0, 31.0]])
    for options in ({"side": 96, "edge": "shortest"}, {"side": 95}):
        with pytest.raises(UsageError, match="give the longest edge, and a multiple of"):
            embed_regions_dense(teacher, image, boxes, square=True, **options)


@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    side=st.integers(1, 2000),
    stride=st.sampled_from([12, 14, 16, 32]),
)
def test_resized_shape(size, side, stride):
    for edge, pick in (("longest", max), ("shortest", min)):
        shape = resized_shape(*size, side, edge, stride)
        for length, found in zip(size, shape):
            exact = length * side / pick(size)
            assert found % stride == 0 and found >= stride
            assert abs(found - exact) <= stride / 2 or (found == stride and exact < stride / 2)
    with pytest.raises(UsageError, match="'width'"):
        resized_shape(*size, side, "width", stride)


@pytest.mark.parametrize("name", ["dense-vit", "dense-resnet"])
def test_gradients_flow_and_nothing_is_changed(name, build):
    visual = build(name).visual
    before = {key: tensor.clone() for key, tensor in visual.state_dict().items()}
    forwards = [module.forward.__func__ for module in visual.modules()]
    rows = pool_regions(visual, dense_map(visual, pixels_of(1, 3, 96, 128)), [torch.tensor([[9.0, 4.0, 99.0, 80.0]])])
    rows.square().sum().backward()
    assert all(parameter.grad is not None for parameter in visual.parameters())
    first, last = visual.conv1, visual.ln_post if name == "dense-vit" else visual.attnpool.c_proj
    assert first.weight.grad.abs().max() > 0 and last.weight.grad.abs().max() > 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in visual.state_dict().items())
    assert forwards == [module.forward.__func__ for module in visual.modules()]


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense-vit", "dense-resnet"])
def test_half_precision_gives_float32_rows(name, build):
    visual = build(name).visual
    pixels, boxes = pixels_of(1, 3, 96, 160), [torch.tensor([[10.0, 9.0, 75.5, 60.25]])]
    expected = pool_regions(visual, dense_map(visual, pixels), boxes)
    found = dense_map(visual.bfloat16(), pixels)
    assert found.dtype == torch.bfloat16
    row = pool_regions(visual, found, boxes)
    assert row.dtype == torch.float32 and F.cosine_similarity(row, expected) > 0.995


def test_towers_without_dense_features_are_refused(build):
    with pytest.raises(UsageError, match="'eva02_tiny_patch14_224'.*choose an open_clip ViT"):
        dense_map(build("dense-eva").visual, pixels_of(1, 3, 28, 28))
    for name in ("dense-coca", "dense-qk-norm", "dense-mean"):
        with pytest.raises(UsageError, match="VisionTransformer"):
            dense_map(build(name).visual, pixels_of(1, 3, 32, 32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree(teacher):
    image, boxes = (
        torch.randint(256, (3, 96, 160), dtype=torch.uint8),
        torch.tensor([[10.0, 20.0, 80.0, 64.0], [0.0, 0.0, 160.0, 96.0]]),
    )
    expected = embed_regions_dense(teacher, image, boxes, side=160)
    try:
        found = embed_regions_dense(teacher.cuda(), image, boxes, side=160)
    finally:
        teacher.cpu()
    assert found.is_cuda and F.cosine_similarity(found.cpu(), expected).min() > 0.999
