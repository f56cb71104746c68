"""Trunks: strides and sizes, parity with the libraries they come from, and what freezing means."""

import copy
import re

import open_clip
import pytest
import timm
import torch
from detectron2.modeling import build_backbone
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file

from ovdet2.config import get_cfg
from ovdet2.errors import DataError, UsageError
from ovdet2.modeling.backbone import CLIPPyramid, CLIPResNet, CLIPViT, TimmSwin
from ovdet2.modeling.backbone.clip_vit import read_blocks
from ovdet2.modeling.backbone.timm_swin import load_swin, swin_trunk
from ovdet2.vlm.dense import attention_free_block, dense_map, embed_patch_tokens, pool_regions
from ovdet2.vlm.teacher import Teacher
from tests.oracles.swin import swin_maps

ALL = ("res2", "res3", "res4", "res5")
TINY = {"embed_dim": 12, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 3, 6), "window_size": 4}


def tiny_swin(**changes):
    torch.manual_seed(0)
    return swin_trunk("swin_tiny_patch4_window7_224", **{"drop_path": 0.0, **TINY, **changes})


def tiny_clip():
    """A CLIP ResNet whose statistics and last norms are not those of the start, in evaluation mode."""
    torch.manual_seed(0)
    visual = ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=8, image_size=64, width=8)
    for module in visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return visual.eval()


def tiny_vit(patch):
    """A CLIP ViT of five blocks whose native grid is 3x5, of random weights, in evaluation mode."""
    torch.manual_seed(0)
    visual = VisionTransformer((3 * patch, 5 * patch), patch, width=32, layers=5, heads=2, mlp_ratio=2.0, output_dim=8)
    return visual.eval()


def open_clip_tower(name):
    """An image tower of random weights, whose norms and statistics are not those of the start."""
    torch.manual_seed(0)
    visual = open_clip.create_model(name).visual
    for module in visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return visual.eval()


@pytest.fixture(scope="module")
def teacher():
    return Teacher.load("ovshapes-resnet", "embedded")


def clip_cfg(**keys):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_clip_resnet_backbone"
    cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED = "ovshapes-resnet", "embedded"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [122.771, 116.746, 104.094], [68.501, 66.632, 70.323]
    cfg.INPUT.FORMAT = "RGB"
    cfg.merge_from_list([part for key, value in keys.items() for part in (key.replace("__", "."), value)])
    return cfg


class TestCLIPResNet:
    def test_last_map_is_what_clip_pools(self, teacher):
        """Of the embedded model, at its own size."""
        pixels = torch.randn(2, 3, teacher.image_size, teacher.image_size, generator=torch.Generator().manual_seed(0))
        visual, seen = copy.deepcopy(teacher.clip.visual), []
        visual.attnpool.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        visual(pixels)
        found = CLIPResNet(teacher.clip.visual, ALL)(pixels)
        assert torch.allclose(found["res5"], seen[0], atol=1e-5) and seen[0].abs().max() > 0.1
        assert [tuple(found[name].shape[1:]) for name in ALL] == [(96, 24, 24), (192, 12, 12), (384, 6, 6), (768, 3, 3)]

    @pytest.mark.parametrize("size", [(64, 64), (96, 160), (70, 101)])
    def test_shapes_are_as_announced(self, size):
        trunk = CLIPResNet(tiny_clip(), ALL)
        found = trunk(torch.randn(2, 3, *size))
        for name, spec in trunk.output_shape().items():
            assert found[name].shape == (2, spec.channels, size[0] // spec.stride, size[1] // spec.stride)
        assert [trunk.output_shape()[name].stride for name in ALL] == [4, 8, 16, 32]

    def test_batch_equals_singles_and_a_part_of_the_maps_is_the_same(self):
        pixels, visual = torch.randn(2, 3, 64, 96), tiny_clip()
        whole, part = CLIPResNet(visual, ALL).eval(), CLIPResNet(visual, ("res3", "res4")).eval()
        batch = whole(pixels)
        assert torch.allclose(whole(pixels[1:])["res5"], batch["res5"][1:], atol=1e-5)
        assert list(part(pixels)) == ["res3", "res4"] and torch.equal(part(pixels)["res4"], batch["res4"])

    @pytest.mark.parametrize("freeze_at", [0, 2, 5])
    def test_training_leaves_frozen_stages_and_all_statistics(self, freeze_at):
        """Bit-identical; what is not frozen moves, and nothing trainable is without a gradient."""
        given = tiny_clip()
        untouched = copy.deepcopy(given.state_dict())
        trunk = CLIPResNet(given, ("res3", "res5"), freeze_at).train()
        before = copy.deepcopy(trunk.state_dict())
        trained = [p for p in trunk.parameters() if p.requires_grad]
        assert bool(trained) == (freeze_at < 5)
        if trained:
            sum(level.square().mean() for level in trunk(torch.randn(2, 3, 64, 64)).values()).backward()
            torch.optim.SGD(trained, lr=0.1, weight_decay=0.1).step()
            assert all(p.grad is not None for p in trained)
        after = trunk.state_dict()
        moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
        stages = [{"conv1", "conv2", "conv3"}, {"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]
        assert moved == set().union(*stages[freeze_at:])
        assert not any(
            "running" in name or ".bn" in name for name in after if not torch.equal(after[name], before[name])
        )
        assert all(torch.equal(value, untouched[name]) for name, value in given.state_dict().items())

    def test_stages_above_the_maps_are_not_trained(self):
        trunk = CLIPResNet(tiny_clip(), ("res3",))
        assert not any(p.requires_grad for p in trunk.visual.layer3.parameters())
        assert all(p.requires_grad for name, p in trunk.visual.layer2.named_parameters() if "conv" in name)

    def test_by_configuration(self, teacher):
        trunk = build_backbone(clip_cfg(MODEL__BACKBONE__FREEZE_AT="5"))
        assert not any(p.requires_grad for p in trunk.parameters()) and trunk.visual.attnpool is None
        assert torch.equal(trunk.visual.conv1.weight, teacher.clip.visual.conv1.weight)

    def test_with_its_pool_it_is_clip_at_224(self):
        """Random weights: the last map and the attention pool are encode_image, and no parameter of the pool moves."""
        visual = open_clip_tower("RN50")
        trunk = CLIPResNet(visual, ALL, keep_pool=True).eval()
        assert (
            not any(p.requires_grad for p in trunk.visual.attnpool.parameters())
            and trunk.visual.conv1.weight.requires_grad
        )
        pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = trunk.embed_regions(trunk(pixels)["res5"], [torch.tensor([[0.0, 0.0, 224.0, 224.0]])])
            expected = visual(pixels)
        assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)

    @pytest.mark.parametrize("name, channels, grid", [
        ("RN50", 256, 7), ("RN50x4", 320, 9), ("RN50x16", 384, 12), ("RN50x64", 512, 14),
    ])  # fmt: skip
    def test_published_sizes(self, name, channels, grid):
        """Channels and the pool's grid, of towers without memory."""
        with torch.device("meta"):
            vision = open_clip.get_model_config(name)["vision_cfg"]
            visual = ModifiedResNet(
                vision["layers"], 8, vision["width"] * 32 // 64, image_size=vision["image_size"], width=vision["width"]
            )
            trunk = CLIPResNet(visual, ALL, 5, keep_pool=True)
        assert [trunk.output_shape()[level].channels for level in ALL] == [channels * 2**level for level in range(4)]
        assert len(trunk.visual.attnpool.positional_embedding) == grid**2 + 1

    @pytest.mark.parametrize("keys, words", [
        ({"INPUT__FORMAT": "BGR"}, "INPUT.FORMAT to RGB"),
        ({"MODEL__PIXEL_MEAN": "[123.675, 116.28, 103.53]"}, "PIXEL_MEAN .122.771"),
        ({"MODEL__TEACHER__ARCHITECTURE": "ovshapes-vit"}, "no ResNet of CLIP"),
        ({"MODEL__RESNETS__OUT_FEATURES": "['res6']"}, "res2, res3, res4, res5"),
    ])  # fmt: skip
    def test_settings_that_do_not_go_together(self, keys, words):
        with pytest.raises(UsageError, match=words):
            build_backbone(clip_cfg(**keys))


class TestCLIPViT:
    def test_blocks_are_the_same_fractions_of_any_depth(self):
        assert read_blocks(12) == (3, 5, 7, 11) and read_blocks(24) == (7, 11, 15, 23)
        assert read_blocks(5) == (1, 2, 3, 4) and read_blocks(1) == (0, 0, 0, 0)

    @pytest.mark.parametrize("patch", [8, 12, 14, 16, 32])
    @pytest.mark.parametrize("size", [(64, 64), (96, 160), (70, 101)])
    def test_shapes_are_as_announced(self, size, patch):
        trunk = CLIPViT(tiny_vit(patch), norm="BN").eval()
        found = trunk(torch.randn(2, 3, *size))
        for name, spec in trunk.output_shape().items():
            assert found[name].shape == (2, spec.channels, size[0] // spec.stride, size[1] // spec.stride)
        assert [trunk.output_shape()[name].stride for name in ALL] == [4, 8, 16, 32] and trunk.size_divisibility == 32
        assert found["tokens"].shape == (2, 32, -(-size[0] // patch), -(-size[1] // patch))

    @torch.no_grad()
    def test_tokens_are_those_of_the_blocks(self):
        """Block by block of the module itself; the last in its attention-free form."""
        visual = tiny_vit(16)
        pixels = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
        maps = visual.conv1(pixels).flatten(2).mT
        tokens = torch.cat([visual.class_embedding.expand(2, 1, -1), maps], 1) + visual.positional_embedding
        tokens, expected = visual.ln_pre(tokens), []
        for index, block in enumerate(visual.transformer.resblocks):
            tokens = attention_free_block(block, tokens) if index == 4 else block(tokens)
            expected.append(tokens[:, 1:].mT.reshape(2, 32, 3, 5))
        for found, index in zip(CLIPViT(visual).token_maps(pixels), (1, 2, 3, 4)):
            assert torch.allclose(found, expected[index], atol=1e-5)

    @pytest.mark.parametrize("patch", [12, 14, 16])
    def test_resampled_maps_lie_where_the_patches_lie(self, patch, monkeypatch):
        """Patches that hold their own position give cells that hold theirs, but at the border."""
        trunk = CLIPViT(tiny_vit(patch)).eval()
        height, width = 160, 224
        rows, columns = (patch * (torch.arange(-(-side // patch)) + 0.5) for side in (height, width))
        position = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None].repeat(1, 16, 1, 1)
        monkeypatch.setattr(trunk, "token_maps", lambda _: [position] * 4)
        found = trunk(torch.zeros(1, 3, height, width))["res4"][0]
        expected = torch.stack(
            torch.meshgrid(*(16 * (torch.arange(side // 16) + 0.5) for side in (height, width)), indexing="ij")
        )
        assert torch.allclose(found[:2, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-3)
        coarse = trunk(torch.zeros(1, 3, height, width))["res5"][0, 0, :, 0]  # the later of two patches
        assert torch.allclose(coarse.diff()[1:-1], torch.tensor(32.0), atol=1e-3)

    @torch.no_grad()
    @pytest.mark.parametrize("halve", [False, True])
    def test_resampled_maps_equal_float64_reference(self, halve):
        """Width 32 is kept, as in CLIM's and CLIPSelf's code, or halved by each transposed convolution."""
        trunk, pixels = CLIPViT(tiny_vit(16), norm="BN", halve_channels=halve).eval(), torch.randn(1, 3, 64, 96)
        widths = (8, 16, 32, 32) if halve else (32, 32, 32, 32)
        assert tuple(trunk.output_shape()[name].channels for name in ALL) == widths
        tokens = [of_block.double() for of_block in trunk.token_maps(pixels)]

        def doubled(maps, conv):
            """Each cell becomes 2 x 2."""
            weight, bias = conv.weight.double(), conv.bias.double()
            return torch.einsum("nihw,ioyx->nohywx", maps, weight).flatten(4).flatten(2, 3) + bias[:, None, None]

        first, norm, _, second = trunk.resample["res2"]
        hidden = doubled(tokens[0], first) / (1 + 1e-5) ** 0.5  # a norm at its start
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        expected = [doubled(hidden, second), doubled(tokens[1], trunk.resample["res3"]), tokens[2]]
        expected.append(tokens[3].unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5)))
        assert norm.num_features == widths[1]
        found = trunk(pixels)
        for name, values in zip(ALL, expected, strict=True):
            assert torch.allclose(found[name].double(), values, atol=1e-5), name

    @torch.no_grad()
    @pytest.mark.parametrize("size", [(224, 224), (70, 101)])
    def test_regions_are_pooled_from_clips_dense_map(self, size):
        visual = tiny_vit(14)
        trunk, pixels = CLIPViT(visual).eval(), torch.randn(2, 3, *size)
        boxes = [torch.tensor([[3.0, 5.0, 60.0, 61.0]]), torch.tensor([[0.0, 0.0, 30.0, 64.0], [9.0, 9.0, 10.0, 10.0]])]
        tokens = trunk(pixels)["tokens"]
        whole = torch.nn.functional.pad(pixels, (0, -size[1] % 14, 0, -size[0] % 14))
        expected = dense_map(visual, whole)
        assert torch.allclose(embed_patch_tokens(visual, tokens.flatten(2).mT, tokens.shape[2:]), expected, atol=1e-5)
        assert torch.allclose(trunk.embed_regions(tokens, boxes), pool_regions(visual, expected, boxes), atol=1e-5)

    @pytest.mark.parametrize("frozen", [True, False])
    def test_training(self, frozen):
        """Frozen, CLIP keeps its bits and no activation; otherwise all that the maps depend on is trained."""
        given = tiny_vit(16)
        untouched = copy.deepcopy(given.state_dict())
        trunk = CLIPViT(given, frozen=frozen, norm="BN").train()
        before = copy.deepcopy(trunk.state_dict())
        found = trunk(torch.randn(2, 3, 64, 64))
        assert (found["tokens"].grad_fn is None) == frozen
        sum(found[name].square().mean() for name in ALL).backward()
        trained = [p for p in trunk.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        torch.optim.SGD(trained, lr=0.1, weight_decay=0.1).step()
        moved = {name for name, value in trunk.state_dict().items() if not torch.equal(before[name], value)}
        assert any(name.startswith("resample.") for name in moved)
        assert any(name.startswith("visual.") for name in moved) != frozen
        assert all(torch.equal(value, untouched[name]) for name, value in given.state_dict().items())

    def test_by_configuration(self):
        keys = {
            "MODEL__TEACHER__ARCHITECTURE": "ovshapes-vit",
            "MODEL__RESNETS__OUT_FEATURES": "['res2','res3','res4','res5']",
        }
        keys |= {
            "MODEL__BACKBONE__NAME": "build_clip_fpn_backbone",
            "MODEL__FPN__IN_FEATURES": "['res2','res3','res4','res5']",
        }
        backbone = build_backbone(clip_cfg(MODEL__BACKBONE__FREEZE_AT="5", **keys))
        assert isinstance(backbone, CLIPPyramid) and backbone.size_divisibility == 32
        assert backbone.trunk.blocks == (1, 2, 3, 4) and backbone.trunk.frozen
        assert {name: spec.stride for name, spec in backbone.output_shape().items()} == {
            "p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64
        }  # fmt: skip
        with pytest.raises(UsageError, match="set 5 to freeze all of a CLIP ViT, or 0"):
            build_backbone(clip_cfg(MODEL__BACKBONE__FREEZE_AT="2", **keys))

    def test_towers_that_do_not_fit(self):
        with pytest.raises(UsageError, match="ModifiedResNet, no ViT of CLIP"):
            CLIPViT(ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=8, image_size=64, width=8))
        with pytest.raises(UsageError, match="res2, res3, res4, res5, not res6"):
            CLIPViT(tiny_vit(16), ("res6",))
        eva = open_clip.model._build_vision_tower(
            8, {"image_size": 28, "timm_model_name": "eva02_tiny_patch14_224", "timm_proj": "linear"}
        )
        with pytest.raises(UsageError, match="eva02_tiny_patch14_224"):
            CLIPViT(eva)


class TestTimmSwin:
    @pytest.mark.parametrize("size", [(64, 64), (96, 130), (33, 70), (20, 20)])
    def test_shapes_are_as_announced(self, size):
        trunk = TimmSwin(tiny_swin(), ALL).eval()
        found = trunk(torch.randn(1, 3, *size))
        for name, spec in trunk.output_shape().items():
            assert found[name].shape == (1, spec.channels, -(-size[0] // spec.stride), -(-size[1] // spec.stride))
            assert torch.isfinite(found[name]).all()

    def test_equals_timm_at_its_own_size(self):
        """Where no stage is a single window, there are no choices to make; the norms start as plain ones."""
        trunk = tiny_swin()
        torch.manual_seed(0)
        plain = timm.create_model(
            "swin_tiny_patch4_window7_224", pretrained=False, features_only=True, img_size=256, **TINY
        ).eval()
        plain.load_state_dict(
            {name.replace("layers.", "layers_", 1): v for name, v in trunk.state_dict().items()}, strict=False
        )
        pixels = torch.randn(1, 3, 256, 256)
        found = TimmSwin(trunk, ALL).eval()(pixels)
        for name, expected in zip(ALL, plain(pixels)):
            expected = torch.nn.functional.layer_norm(expected, expected.shape[-1:]).permute(0, 3, 1, 2)
            assert torch.allclose(found[name], expected, atol=1e-5)

    @pytest.mark.parametrize("size", [(50, 68), (100, 136), (64, 64), (97, 131), (30, 200), (20, 20)])
    def test_equals_the_published_detectors(self, size):
        """50 x 68 and 100 x 136 are 800 x 1088 scaled down. Of these sizes only 64 x 64 has multiples of the window."""
        trunk = TimmSwin(tiny_swin(), ALL).double().eval()
        with torch.no_grad():
            for number, (name, value) in enumerate(trunk.named_parameters()):
                noise = torch.sin(torch.arange(value.numel(), dtype=torch.float64) * (number + 1.7)).view_as(value)
                value.copy_(0.5 * noise + name.endswith("weight") * (value.ndim == 1))
        weights = {}
        for name, value in trunk.state_dict().items():
            name = name.removeprefix("trunk.")
            if stage := re.match(r"layers\.(\d)\.downsample(.*)", name):
                name = f"layers.{int(stage[1]) - 1}.downsample{stage[2]}"
            if output := re.match(r"norms\.res(\d)(.*)", name):
                name = f"norm{int(output[1]) - 2}{output[2]}"
            weights[name] = value
        pixels = torch.sin(torch.arange(2 * 3 * size[0] * size[1], dtype=torch.float64) * 0.7).view(2, 3, *size)
        expected = swin_maps(weights, pixels, TINY["depths"], TINY["num_heads"], TINY["window_size"], range(4))
        maps = trunk(pixels)
        for stage, name in enumerate(ALL):
            assert torch.allclose(maps[name], expected[stage], atol=1e-9, rtol=0), name

    def test_padding_comes_before_the_shift(self):
        """With timm's order, most cells of the same maps differ."""
        trunk = tiny_swin().eval()
        plain = timm.create_model(
            "swin_tiny_patch4_window7_224", strict_img_size=False, always_partition=True, **TINY
        ).eval()
        plain.load_state_dict(trunk.state_dict())
        pixels = torch.randn(1, 3, 100, 136, generator=torch.Generator().manual_seed(0))
        pairs = zip(*(net.forward_intermediates(pixels, intermediates_only=True) for net in (trunk, plain)))
        shares = [((one - other).abs().amax(dim=1) > 1e-5).double().mean() for one, other in pairs]
        assert all(share > 0.1 for share in shares), shares

    def test_windows_are_shifted_in_the_last_stage(self):
        """timm leaves it out where the last stage of its classification size is one window."""
        trunk = swin_trunk("swin_tiny_patch4_window7_224", embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6))
        assert trunk.layers[3].blocks[1].shift_size == (3, 3)

    def test_batch_equals_singles(self):
        trunk, pixels = TimmSwin(tiny_swin()).eval(), torch.randn(2, 3, 64, 96)
        assert torch.allclose(trunk(pixels)["res5"][1:], trunk(pixels[1:])["res5"], atol=1e-5)

    @pytest.mark.parametrize("out_features", [("res3", "res4", "res5"), ("res2", "res3")])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_every_parameter_gets_a_gradient(self, out_features, checkpointing):
        """Else several processes could not train it."""
        trunk = TimmSwin(tiny_swin(checkpointing=checkpointing), out_features).train()
        generator = torch.Generator().manual_seed(0)
        found = trunk(torch.randn(1, 3, 64, 64, generator=generator))
        sum((level * torch.randn(level.shape, generator=generator)).sum() for level in found.values()).backward()
        assert [name for name, p in trunk.named_parameters() if p.grad is None] == []

    def test_weights_come_from_a_file(self, tmp_path):
        given = tiny_swin()
        with torch.no_grad():
            given.layers[2].blocks[1].attn.qkv.weight.add_(1)
        save_file(given.state_dict(), str(tmp_path / "swin.safetensors"))
        trunk = tiny_swin()
        load_swin(trunk, tmp_path / "swin.safetensors")
        for name, value in trunk.state_dict().items():
            assert torch.equal(value, given.state_dict()[name]) or name.startswith("head.")

    def test_weights_of_another_number_of_classes(self, tmp_path):
        """As ImageNet-22k's, in a file of Microsoft's repository: other names of head and downsampling, and buffers."""
        given = tiny_swin(num_classes=30)
        names = {}
        for name in given.state_dict():
            stage = re.match(r"layers\.(\d)\.downsample(.*)", name)
            names[name] = (
                f"layers.{int(stage[1]) - 1}.downsample{stage[2]}" if stage else name.replace("head.fc", "head")
            )
        weights = {names[name]: value for name, value in given.state_dict().items()}
        torch.save({"model": weights | {"layers.0.blocks.1.attn_mask": torch.zeros(1)}}, tmp_path / "swin.pth")
        trunk = tiny_swin()
        load_swin(trunk, tmp_path / "swin.pth")
        for name, value in trunk.state_dict().items():
            assert name.startswith("head.") or torch.equal(value, given.state_dict()[name]), name

    @pytest.mark.parametrize("changes, words", [
        ({"depths": (2, 2, 4, 2)}, "lacks.*layers.2.blocks.2.*ARCHITECTURE"), ({"embed_dim": 24}, "does not fit the Swin"),
    ])  # fmt: skip
    def test_weights_of_another_one(self, tmp_path, changes, words):
        save_file(tiny_swin().state_dict(), str(tmp_path / "swin.safetensors"))
        with pytest.raises(DataError, match=f"(?s){words}"):
            load_swin(tiny_swin(**changes), tmp_path / "swin.safetensors")

    def test_by_configuration(self, tmp_path):
        """The file is not asked for where MODEL.WEIGHTS gives all."""
        cfg = get_cfg()
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SWIN.ARCHITECTURE = (
            "build_timm_swin_backbone",
            "swin_tiny_patch4_window7_224",
        )
        cfg.MODEL.SWIN.WEIGHTS = str(tmp_path / "missing.safetensors")
        with pytest.raises(DataError, match="missing.safetensors"):
            build_backbone(cfg)
        cfg.MODEL.WEIGHTS = "detector.pth"
        shapes = build_backbone(cfg).output_shape()
        assert {name: (spec.channels, spec.stride) for name, spec in shapes.items()} == {
            "res3": (192, 8), "res4": (384, 16), "res5": (768, 32)
        }  # fmt: skip
        cfg.MODEL.SWIN.ARCHITECTURE = "resnet50"
        with pytest.raises(UsageError, match="no Swin Transformer 'resnet50'"):
            build_backbone(cfg)
