"""Training of the embedded CLIP models: the average of the weights, distillation, and runs that go on."""

import copy

import open_clip
import pytest
import torch
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.ov_shapes import teachers
from ovdet2.ov_shapes.world.captions import render_captions
from ovdet2.vlm.teacher import Teacher, register_embedded_models

PAIRS = 16


@pytest.fixture(scope="module")
def pairs():
    register_embedded_models()
    images, captions = render_captions(0, PAIRS)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), captions


def arguments(output, *further):
    given = ["--model", "ovshapes-vit", "--output", str(output), "--steps", "4", "--small-steps", "2", "--small-side",
             "48", "--batch", "4", "--pairs", str(PAIRS), "--threads", "1", *further]  # fmt: skip
    return teachers._parse(given)


def small_vit():
    return open_clip.create_model("ovshapes-vit", force_image_size=48)


class TestGuide:
    def test_loss_in_float64(self, pairs):
        guide = teachers.Guide("ovshapes-resnet", small_vit())
        pixels = F.interpolate(pairs[0][:3].float() / 255, size=(96, 96))
        features = F.normalize(torch.randn(3, 128, generator=torch.Generator().manual_seed(0)), dim=1)
        clip = copy.deepcopy(Teacher.load("ovshapes-resnet", "embedded").clip).double()
        with torch.no_grad():
            goal = clip.encode_image(pixels.double())
        goal = goal / goal.norm(dim=1, keepdim=True)
        expected = ((features.double() - goal) ** 2).sum() / 3
        assert guide.side == 96
        assert guide.loss(features, pixels).item() == pytest.approx(expected.item(), abs=1e-5)
        assert guide.loss(goal.float(), pixels).item() == pytest.approx(0.0, abs=1e-6)

    def test_the_text_tower_is_the_guides_and_the_image_tower_is_not(self):
        model = small_vit()
        before = copy.deepcopy(model.visual.state_dict())
        teachers.Guide("ovshapes-resnet", model)
        clip = Teacher.load("ovshapes-resnet", "embedded").clip
        tokens = open_clip.get_tokenizer("ovshapes-vit")(["a striped moon"])
        with torch.no_grad():
            assert torch.equal(model.encode_text(tokens), clip.encode_text(tokens))
        assert torch.equal(model.logit_scale, clip.logit_scale)
        assert all(torch.equal(value, before[name]) for name, value in model.visual.state_dict().items())

    def test_another_text_tower_is_refused(self):
        model = open_clip.CLIP(
            embed_dim=128,
            vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=64, head_width=32, patch_size=12, image_size=48),
            text_cfg=open_clip.CLIPTextCfg(context_length=32, width=64, heads=2, layers=1),
        )
        with pytest.raises(UsageError, match="--distil ovshapes-resnet: its text tower"):
            teachers.Guide("ovshapes-resnet", model)


def test_resized_is_smoothed():
    stripes = (torch.arange(96) % 2).float().expand(1, 3, 96, 96)
    assert torch.equal(teachers.resized(stripes, 96), stripes)
    assert torch.allclose(teachers.resized(stripes, 48), torch.tensor(0.5), atol=0.1)


@pytest.mark.parametrize("stopped_at, further", [(1, []), (3, ["--distil", "ovshapes-resnet"])])
def test_an_interrupted_run_ends_bit_for_bit(tmp_path, pairs, monkeypatch, further, stopped_at):
    whole = teachers.train(arguments(tmp_path / "whole", *further), *pairs).state_dict()
    monkeypatch.setattr(teachers, "_SAVE_EVERY", stopped_at)
    (tmp_path / "parts").mkdir()

    class Stopped(Exception):
        pass

    def save(path, *parts):
        saved(path, *parts)
        raise Stopped

    saved = teachers._save_resume
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(teachers, "_save_resume", save)
        teachers.train(arguments(tmp_path / "parts", *further), *pairs)
    monkeypatch.setattr(teachers, "_SAVE_EVERY", 1000)
    continued = teachers.train(arguments(tmp_path / "parts", *further), *pairs).state_dict()
    assert all(torch.equal(value, continued[name]) for name, value in whole.items())
    with pytest.raises(UsageError, match="of a run with other arguments"):
        teachers.train(arguments(tmp_path / "parts", *further, "--lr", "1"), *pairs)


def test_the_result_is_the_average_of_the_full_size_steps(tmp_path, pairs, monkeypatch):
    """With decay 0 it is the last step's weights, with decay 1 those of the first step at the full size."""
    steps = []
    monkeypatch.setattr(teachers, "_SAVE_EVERY", 1)
    monkeypatch.setattr(
        teachers, "_save_resume", lambda path, model, *_: steps.append(copy.deepcopy(model.state_dict()))
    )
    (tmp_path / "a").mkdir()
    kept = teachers.train(arguments(tmp_path / "a", "--average", "1.0"), *pairs).state_dict()
    third = steps[2]  # of four; the first two are of small images
    assert all(torch.allclose(value, third[name], atol=1e-7) for name, value in kept.items())
    last = teachers.train(arguments(tmp_path / "a", "--average", "0.0"), *pairs).state_dict()
    assert any(not torch.allclose(value, third[name], atol=1e-7) for name, value in last.items())
