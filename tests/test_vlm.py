"""The teacher and its crops, on a CLIP of random weights small enough for a test."""

import copy
import warnings
import zipfile

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.vlm.crops import POLICIES, crop_regions, crop_windows, embed_regions, pillow_crops, scale_boxes
from ovdet2.vlm.teacher import Teacher, state_dict_sha256
from ovdet2.vlm.weight_files import is_torchscript
from tests import micro


@pytest.fixture
def weights(micro_clip_weights):
    return micro_clip_weights


@pytest.fixture
def teacher(micro_teacher):
    return micro_teacher


def test_teacher_is_frozen_and_fingerprinted(teacher, weights):
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training and teacher.embed_dim == 16 and teacher.image_size == 32
    assert teacher.fingerprint.pretrained == "w.safetensors"
    assert teacher.fingerprint.weights_sha256 == state_dict_sha256(teacher.clip.state_dict())
    changed = dict(teacher.clip.state_dict(), logit_scale=torch.tensor(1.0))
    assert state_dict_sha256(changed) != teacher.fingerprint.weights_sha256


def test_hash_does_not_depend_on_storage_precision(teacher):
    half = {k: v.half() for k, v in teacher.clip.state_dict().items()}
    assert state_dict_sha256(half) == state_dict_sha256({k: v.float() for k, v in half.items()})


def test_batch_equals_singles_and_empty(teacher):
    pixels = (micro.wave((5, 3, 32, 32), 0.1) + 1) / 2
    together = teacher.encode_image(pixels, batch_size=2)
    singles = torch.cat([teacher.encode_image(p[None]) for p in pixels])
    assert torch.allclose(together, singles, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(5), atol=1e-6)
    assert teacher.encode_image(pixels[:0]).shape == (0, 16)
    texts = ["a cat", "a dog", "the longer text"]
    assert torch.allclose(
        teacher.encode_text(texts, batch_size=2), torch.cat([teacher.encode_text([t]) for t in texts]), atol=1e-6
    )


def test_long_prompt_is_refused(teacher):
    with pytest.raises(UsageError, match="more than the 14 tokens"):
        teacher.encode_text(["a photo of " + "very " * 20 + "long name"])


def test_openai_weights_get_their_activation(monkeypatch):
    seen = {}

    def create(architecture, **arguments):
        seen.update(arguments)
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model", create)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(SetupError, match="no network.*Try again, or give the path of a weight file"):
            Teacher.load("ViT-B-32", tag)
        assert seen["force_quick_gelu"] is quick


@pytest.mark.parametrize("cause, remedy", [(ConnectionError("gone"), "Check the connection"), (OSError("disk"), "Try again")])  # fmt: skip
def test_weights_that_cannot_be_downloaded(cause, remedy, monkeypatch):
    def create(*_, **__):
        raise RuntimeError("Failed to download weights") from cause

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(SetupError, match=f"could not be downloaded .*{remedy}, or give the path of a weight file"):
        Teacher.load("ViT-B-32", "openai")
    with pytest.raises(DataError, match="architecture .* must be that of the file, and the file complete"):
        Teacher.load("ovshapes-resnet", "embedded")


def test_torchscript_archive(teacher, tmp_path):
    """As OpenAI publishes its models: half precision, with three numbers among the weights."""
    whole = copy.deepcopy(teacher.clip)
    for name in ("input_resolution", "context_length", "vocab_size"):
        whole.__dict__.pop(name, None)
        whole.register_buffer(name, torch.tensor(1))
    whole.attn_mask = whole._buffers.pop("attn_mask")  # no weight in theirs
    tokens = teacher.tokenizer(["a cat"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of tracing and its age
        traced = torch.jit.trace(whole, (torch.zeros(1, 3, 32, 32), tokens), check_trace=False).half()
        torch.jit.save(traced, tmp_path / "RN50.pt")
        found = Teacher.load("micro-clip", tmp_path / "RN50.pt")
    halved = {name: tensor.half().float() for name, tensor in teacher.clip.state_dict().items()}
    for name, tensor in found.clip.state_dict().items():
        assert torch.equal(tensor, halved[name]), name


def test_archives_that_torch_would_unpickle_are_read_as_weights_alone(weights, tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "plain.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "two.pt", "w") as archive:
        for name in ("archive/version", "archive/data.pkl", "other/constants.pkl", "archive/more/constants.pkl"):
            archive.writestr(name, "3\n")
    for path in (tmp_path / "plain.pt", tmp_path / "text.pt", tmp_path / "two.pt", weights):
        assert not is_torchscript(path)


def test_bad_teachers(weights, tmp_path):
    with pytest.raises(UsageError, match="no architecture 'ViT-Z'"):
        Teacher.load("ViT-Z", "openai")
    with pytest.raises(UsageError, match="is not embedded"):
        Teacher.load("ViT-B-32", "embedded")
    with pytest.raises(UsageError, match="neither a file nor a pretrained tag"):
        Teacher.load("ViT-B-32", "no/such/file.pt")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="torn.safetensors is no complete safetensors file"):
        Teacher.load("micro-clip", str(torn))


def test_scale_boxes():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 100.0, 50.0], [99.9, 49.9, 100.0, 50.0]])
    assert torch.equal(scale_boxes(boxes[:2], 1.0, 50 + 10, 100), boxes[:2])
    assert scale_boxes(boxes[:1], 1.5, 100, 100).tolist() == [[5.0, 10.0, 35.0, 70.0]]
    small = scale_boxes(boxes, 1.5, 50, 100)
    assert (small[:, 2:] - small[:, :2] >= 1).all() and (small >= 0).all()
    assert (small[:, 2] <= 100).all() and (small[:, 3] <= 50).all()


def picture(height=64, width=96):
    """An 8-bit image [3, H, W] with structure at several scales."""
    return ((micro.wave((3, height, width), 0.07) + 1) * 127.5).round().to(torch.uint8)


BOXES = torch.tensor(
    [[4.0, 4.0, 30.0, 40.0], [50.4, 10.6, 90.2, 20.0], [0.0, 0.0, 96.0, 64.0], [95.5, 63.5, 96.0, 64.0]]
)


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
@pytest.mark.parametrize("policy", POLICIES)
def test_crops_equal_pillow(policy, filter):
    found = crop_regions(picture(), BOXES, 32, policy, filter, (0.5, 0.25, 0.0))
    wanted = pillow_crops(picture(), BOXES, 32, policy, filter, (0.5, 0.25, 0.0))
    assert found.shape == (4, 3, 32, 32) and found.dtype == torch.uint8
    assert (found.int() - wanted.int()).abs().max() <= 1
    flipped = crop_regions(picture(), BOXES.flip(0), 32, policy, filter, (0.5, 0.25, 0.0))
    assert torch.equal(flipped.flip(0), found)
    assert crop_regions(picture(), BOXES[:0], 32, policy).shape == (0, 3, 32, 32)


def test_what_each_policy_cuts():
    boxes = torch.tensor([[10.0, 20.0, 50.0, 40.0]])  # twice as wide as high
    windows = {policy: [t.tolist()[0] for t in crop_windows(boxes, 64, 96, 32, policy)] for policy in POLICIES}
    assert windows["warp"] == [[10, 20, 50, 40], [0, 0, 32, 32]]
    assert windows["centre_crop"] == [[20, 20, 40, 40], [0, 0, 32, 32]]
    assert windows["pad_square"] == [[10, 20, 50, 40], [0, 8, 32, 24]]
    padded = crop_regions(picture(), boxes, 32, "pad_square", fill=(1.0, 0.0, 0.5))[0]
    assert padded[:, :8].float().mean(dim=(1, 2)).tolist() == [255.0, 0.0, 128.0]
    with pytest.raises(UsageError, match="'squash': choose one of warp"):
        crop_windows(boxes, 64, 96, 32, "squash")
    with pytest.raises(UsageError, match="8-bit"):
        crop_regions(picture().float(), boxes, 32)


@given(st.lists(st.tuples(*[st.floats(-20, 120)] * 4), max_size=6), st.sampled_from(POLICIES))
@settings(max_examples=60, deadline=None)
def test_windows_are_never_empty_and_inside(corners, policy):
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)
    windows, targets = crop_windows(boxes, 64, 96, 32, policy)
    for cut, limit in ((windows, [96, 64]), (targets, [32, 32])):
        assert (cut[:, :2] >= 0).all() and (cut[:, :2] < cut[:, 2:]).all() and (cut[:, 2:] <= torch.tensor(limit)).all()


def test_embed_regions_is_the_normalised_sum_of_two_crops(teacher):
    pixels = picture()
    found = embed_regions(teacher, pixels, BOXES, batch_size=2)
    for box, row in zip(BOXES, found):
        one = teacher.encode_image(crop_regions(pixels, scale_boxes(box[None], 1.0, 64, 96), 32))[0].double()
        wide = teacher.encode_image(crop_regions(pixels, scale_boxes(box[None], 1.5, 64, 96), 32))[0].double()
        assert torch.allclose(row.double(), (one + wide) / (one + wide).norm(), atol=1e-5)
    assert torch.allclose(embed_regions(teacher, pixels, BOXES.flip(0)), found.flip(0), atol=1e-5)
    assert embed_regions(teacher, pixels, BOXES[:0]).shape == (0, 16)


def test_mixed_precision_stays_close(teacher):
    crops = crop_regions(picture(), BOXES, 32)
    exact = teacher.encode_image(crops)
    half = teacher.encode_image(crops, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert (half * exact).sum(dim=1).min() > 0.99
    assert torch.equal(exact, teacher.encode_image(crops.float() / 255))
