"""CLIM's loss over two processes, what is trained, exact resume, averaged weights, and what is refused."""

import copy
import math
from pathlib import Path

import clim_cases as cases
import pytest
import torch
from clim.checkpoint import averaged, export, file_architecture
from clim.config import add_clim_config
from clim.model import MAX_LOG_SCALE, CLIMPretraining, clim_loss
from clim.sources import build_source
from clim.text_table import build_text_table
from clim.trainer import ClampLogitScale, CLIMTrainer, build_pretraining, check, prepare
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file
from torch.nn import functional as F

from ovdet2.config import load_config
from ovdet2.data.mosaic import draw_mosaics, grid_boxes
from ovdet2.engine import launch
from ovdet2.errors import DataError, UsageError
from ovdet2.vlm.dense import dense_map, pool_regions
from ovdet2.vlm.teacher import Teacher
from tests.micro import assert_golden, wave

GOLDEN = Path(__file__).parent / "golden"
# Architecture: side of its images, canvas, and a trained weight of its last block or its attention pool.
GOLDEN_CASES = {"clim-vit": (32, 40, "transformer.resblocks.2.mlp.c_fc.weight"),
                "clim-resnet": (64, 128, "attnpool.v_proj.weight")}  # fmt: skip


def batch_of(count, size=32):
    return [
        {
            "image": ((wave((3, size, size), 0.05 + 0.02 * index) + 1) * 127).to(torch.uint8),
            "text": F.normalize(wave((16,), 0.2 + 0.1 * index), dim=0),
        }
        for index in range(count)
    ]


def model_of(name="clim-vit", blocks=2, grids=(2,), singles=1, canvas=48, dtype=torch.float32, **options):
    return CLIMPretraining(cases.teacher_of(name, dtype), blocks, grids, singles, canvas, **options)


@pytest.mark.parametrize("same_text", [0.9999, 1.1])
def test_loss_against_a_loop(same_text):
    """Float64, pair by pair; equal captions are no negatives of each other, unless no cosine is large enough."""
    regions = F.normalize(wave((6, 4), 0.9).double(), dim=1)
    texts = F.normalize(wave((6, 4), 0.4).double(), dim=1)
    texts[4] = texts[1]
    scale = torch.tensor(7.0, dtype=torch.float64)
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j == i or {i, j} != {1, 4} or same_text > 1]
        for ours, theirs in ((regions, texts), (texts, regions)):
            logits = [7.0 * float(ours[i] @ theirs[j]) for j in others]
            total += math.log(sum(map(math.exp, logits))) - 7.0 * float(ours[i] @ theirs[i])
    assert clim_loss(regions, texts, scale, same_text).item() == pytest.approx(total / 12, abs=1e-12)


@pytest.mark.parametrize("name, size, canvas", [("clim-vit", 32, 48), ("clim-resnet", 64, 128)])
def test_embeddings_of_regions_and_singles(name, size, canvas):
    """Regions are pooled from the canvas at their cell, singles are classified as whole images."""
    model, batch = model_of(name, 1, (2,), 1, canvas), batch_of(6, size)
    images = torch.stack([record["image"] for record in batch])
    rows, order = model.embed(images)
    mosaics, rest = draw_mosaics(6, (2,), 1)
    assert order.tolist() == [*mosaics[0].flatten().tolist(), *rest.tolist()]
    pixels = model.normalise(images)
    whole = F.normalize(model.clip.encode_image(pixels[4:]), dim=1)
    torch.testing.assert_close(rows[4:], whole, atol=1e-5, rtol=0)
    canvases = model.compose(pixels)[0]
    regions = pool_regions(model.clip.visual, dense_map(model.clip.visual, canvases), [grid_boxes(2, canvas, canvas)])
    torch.testing.assert_close(rows[:4], regions, atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))


def in_two_processes(out):
    models = out / f"models{comm.get_rank()}"  # of this process: the other must not read a half-written json
    models.mkdir()
    cases.register_models(models)
    model = model_of(dtype=torch.float64)
    batch = batch_of(10)
    mine = batch[:5] if comm.get_rank() == 0 else batch[5:]
    loss = model(mine)["loss_clim"]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for gradient in gradients.values():  # as DistributedDataParallel averages them
        torch.distributed.all_reduce(gradient)
        gradient /= comm.get_world_size()
    torch.save((loss.detach(), gradients), out / f"{comm.get_rank()}.pt")


def test_two_processes_equal_one(tmp_path):
    launch(in_two_processes, 2, args=(tmp_path,), use_cuda=False)
    model = model_of(dtype=torch.float64)
    wanted = model(batch_of(10))["loss_clim"]
    wanted.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        loss, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, wanted.detach(), atol=1e-5, rtol=0)
        assert set(gradients) == set(expected) and "clip.logit_scale" in expected
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    "name, blocks, trained",
    [
        ("clim-vit", 1, ["transformer.resblocks.2."]),
        ("clim-vit", 3, ["transformer.resblocks."]),
        ("clim-vit", -1, [""]),
        ("clim-resnet", 1, ["layer4.", "attnpool."]),
        ("clim-resnet", 2, ["layer3.", "layer4.", "attnpool."]),
    ],
)
def test_what_is_trained(name, blocks, trained):
    """Gradients reach exactly the end of the image tower and the logit scale; statistics stay."""
    size, canvas = (32, 48) if "vit" in name else (64, 128)
    model = model_of(name, blocks, canvas=canvas, freeze_output_and_norms=False).train()
    before = {key: tensor.clone() for key, tensor in model.clip.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(batch_of(5, size))["loss_clim"].backward()
    optimizer.step()
    prefixes = tuple("visual." + prefix for prefix in trained)
    for key, tensor in model.clip.state_dict().items():
        changed = not torch.equal(tensor, before[key])
        parameter = dict(model.clip.named_parameters()).get(key)
        assert (parameter is not None and parameter.requires_grad) == (
            parameter is not None and key.startswith((*prefixes, "logit_scale"))
        )
        assert not changed or parameter.requires_grad, key
    changed = [key for key, tensor in model.clip.state_dict().items() if not torch.equal(tensor, before[key])]
    assert "logit_scale" in changed and any(key.startswith(prefixes[0]) for key in changed)
    assert not model.training


ATTENTION = [
    "attnpool.positional_embedding",
    *(f"attnpool.{kind}_proj.{part}" for kind in "qk" for part in ("weight", "bias")),
]
BLOCK = ["conv1.weight", "conv2.weight", "conv3.weight", "downsample.0.weight"]


@pytest.mark.parametrize("blocks, first", [(1, 4), (2, 3), (-1, 1)])
def test_what_the_authors_train_of_a_resnet(blocks, first):
    """Convolutions of the last stages, query, key and positional embedding of the pool; no norm, no other projection."""
    model = model_of("clim-resnet", blocks, canvas=128).train()
    before = {key: tensor.clone() for key, tensor in model.clip.state_dict().items()}
    expected = [f"layer{stage}.0.{name}" for stage in range(first, 5) for name in BLOCK] + ATTENTION
    expected += [f"conv{number}.weight" for number in (1, 2, 3)] if blocks == -1 else []
    trained = {name for name, p in model.clip.named_parameters() if p.requires_grad}
    assert trained == {f"visual.{name}" for name in expected} | {"logit_scale"}
    model(batch_of(5, 64))["loss_clim"].backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step()
    changed = {key for key, tensor in model.clip.state_dict().items() if not torch.equal(tensor, before[key])}
    # The softmax over keys does not depend on the bias of the keys: its gradient is rounding.
    assert trained - {"visual.attnpool.k_proj.bias"} <= changed <= trained


def test_the_switch_is_of_resnets_only():
    """A ViT has neither; the configuration passes the switch on."""
    names = []
    for name in ("clim-vit", "clim-resnet"):
        models = [model_of(name, 1, canvas=128, freeze_output_and_norms=freeze) for freeze in (True, False)]
        names += [{name for name, p in model.named_parameters() if p.requires_grad} for model in models]
    assert names[0] == names[1] and names[2] < names[3]
    cfg = load_config("", [], add_clim_config)
    for freeze in (True, False):
        cfg.CLIM.FREEZE_OUTPUT_AND_NORMS, cfg.CLIM.TRAINABLE_BLOCKS, cfg.CLIM.CANVAS = freeze, 1, 128
        model = build_pretraining(cfg, cases.teacher_of("clim-resnet"))
        assert model.clip.visual.attnpool.v_proj.weight.requires_grad != freeze


def test_a_square_of_the_evaluation_that_does_not_fit():
    """Refused before the training, not after it."""
    evaluation = ["CLIM.EVALUATION.DATASET", "ov_shapes_val_all", "CLIM.EVALUATION.SIDE", 60, "CLIM.CANVAS", 48]
    cfg = load_config("", [*evaluation, "CLIM.GRIDS", [2], "CLIM.TRAINABLE_BLOCKS", 1], add_clim_config)
    with pytest.raises(
        UsageError, match="EVALUATION.SIDE is 60: with SQUARE it must be a multiple of 8 px, .*clim-vit"
    ):
        build_pretraining(cfg, cases.teacher_of("clim-vit"))
    cfg.CLIM.EVALUATION.SQUARE = False
    build_pretraining(cfg, cases.teacher_of("clim-vit"))


def test_mixed_precision_gives_a_float32_loss():
    model, batch = model_of(), batch_of(5)
    expected = model(batch)["loss_clim"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(batch)["loss_clim"]
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), abs=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name, size, canvas", [("clim-vit", 32, 48), ("clim-resnet", 64, 128)])
def test_devices_agree(name, size, canvas, monkeypatch):
    """Loss and gradients of a step on CUDA are those on the CPU; in bfloat16 the loss is near."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    batch, expected = batch_of(6, size), model_of(name, 1, canvas=canvas)
    found = copy.deepcopy(expected).cuda()
    losses = [model(batch)["loss_clim"] for model in (expected, found)]
    assert losses[1].is_cuda and losses[1].item() == pytest.approx(losses[0].item(), rel=1e-3)
    for loss in losses:
        loss.backward()
    pairs = [(p.grad, q.grad) for p, q in zip(expected.parameters(), found.parameters()) if p.grad is not None]
    for one, other in pairs:
        assert F.cosine_similarity(one.flatten(), other.cpu().flatten(), dim=0) > 0.99
    with torch.autocast("cuda", torch.bfloat16):
        assert found(batch)["loss_clim"].item() == pytest.approx(losses[0].item(), abs=0.1)


def test_logit_scale_is_clamped():
    scale = torch.nn.Parameter(torch.tensor(9.0))
    with EventStorage(0):
        ClampLogitScale(scale).after_step()
    assert scale.item() == pytest.approx(MAX_LOG_SCALE) and math.exp(scale.item()) == pytest.approx(100, rel=1e-5)


def golden_tensors(name):
    """A batch of 32 as in the paper: the loss, embeddings, gradients, and the weights after a step of AdamW."""
    side, canvas, weight = GOLDEN_CASES[name]
    model = model_of(name, blocks=1, grids=(2, 3, 4), singles=3, canvas=canvas, freeze_output_and_norms=False)
    batch = batch_of(32, side)
    rows, _ = model.embed(torch.stack([record["image"] for record in batch]))
    loss = model(batch)["loss_clim"]
    loss.backward()
    trained = model.clip.visual.get_parameter(weight)
    gradients = trained.grad[:4].clone(), model.clip.logit_scale.grad.clone()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3).step()
    return {
        "loss": loss.detach(),
        "rows": rows.detach()[::5],
        "gradient": gradients[0],
        "gradient_scale": gradients[1],
        "stepped": trained.detach()[:4].clone(),
        "loss_after": model(batch)["loss_clim"].detach(),
    }


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden(name):
    """Rewrite: PYTHONPATH=.:projects/CLIM:projects/CLIM/tests python projects/CLIM/tests/test_clim_training.py."""
    assert_golden(GOLDEN / f"{name}.safetensors", golden_tensors(name), gradient_atol=1e-4)


def run(cfg, resume=False, stop=None):
    """(trainer, {iteration: loss}) of a run."""
    prepare(cfg)
    trainer = CLIMTrainer(cfg)
    if stop:
        trainer.register_hooks([cases.Stop(stop)])
    trainer.resume_or_load(resume=resume)
    try:
        trainer.train()
    except KeyboardInterrupt:
        pass
    losses = trainer.storage.histories().get("total_loss")
    return trainer, {} if losses is None else {iteration: loss for loss, iteration in losses.values()}


@pytest.mark.parametrize("source", ["coco", "tar"])
def test_resumed_run_is_the_same(tmp_path, weights, captioned, source):
    """Stopped after 5 of 6 steps, a run goes on from the checkpoint of step 3: equal losses and equal weights."""
    options = []
    if source == "tar":
        from tests.caption_cases import make_shards

        pattern, _ = make_shards(tmp_path, per_shard=(5, 6))
        options = ["CLIM.SOURCE", "tar", "CLIM.CAPTIONS", str(pattern), "CLIM.SHUFFLE_BUFFER", 4]
    whole, losses = run(cases.config(captioned, weights, tmp_path / "whole", *options))
    cfg = cases.config(captioned, weights, tmp_path / "cut", *options)
    run(cfg, stop=5)
    resumed, later = run(cfg, resume=True)
    assert list(losses) == list(range(6)) and list(later) == [3, 4, 5]
    assert later == {iteration: losses[iteration] for iteration in later}
    state = resumed.clip.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.clip.state_dict().items())
    original = Teacher.load("clim-vit", weights).clip.state_dict()
    text = [name for name in state if not name.startswith(("visual.", "logit_scale"))]
    assert text and all(torch.equal(state[name], original[name]) for name in text)
    _, nothing = run(cfg, resume=True)  # a finished run, resumed to publish other averages
    assert nothing == {}


def test_resume_of_another_model(tmp_path, weights, captioned):
    cfg = cases.config(captioned, weights, tmp_path / "run", "SOLVER.MAX_ITER", 1)
    run(cfg)
    state = {name: tensor.contiguous() for name, tensor in cases.clip_of("clim-vit").state_dict().items()}
    state["logit_scale"] = state["logit_scale"] + 1
    save_file(state, str(tmp_path / "other.safetensors"))
    table = ["CLIM.TEXT_TABLE", str(tmp_path / "t.safetensors")]
    cfg = cases.config(captioned, tmp_path / "other.safetensors", tmp_path / "run", "SOLVER.MAX_ITER", 2, *table)
    with pytest.raises(DataError, match="started from.*not from"):
        run(cfg, resume=True)


def test_resume_with_other_settings(tmp_path, weights, captioned):
    """Weights are never published under settings that did not make them."""
    run(cases.config(captioned, weights, tmp_path / "run", "SOLVER.MAX_ITER", 1))
    for key, value in (("CANVAS", 64), ("GRIDS", [1]), ("TRAINABLE_BLOCKS", 1)):
        cfg = cases.config(captioned, weights, tmp_path / "run", "SOLVER.MAX_ITER", 1, f"CLIM.{key}", value)
        with pytest.raises(DataError, match=f"run with other settings .CLIM.{key} .*, now .*resume it with its own"):
            run(cfg, resume=True)


def test_resume_of_a_resnet_from_before_the_switch(tmp_path, captioned):
    """Such a run trained all of the last stage and the pool: the settings of today are other ones."""
    state = {name: tensor.contiguous() for name, tensor in cases.clip_of("clim-resnet").state_dict().items()}
    save_file(state, str(tmp_path / "resnet.safetensors"))
    options = ["MODEL.TEACHER.ARCHITECTURE", "clim-resnet", "CLIM.CANVAS", 64, "CLIM.FREEZE_OUTPUT_AND_NORMS"]
    cfgs = [
        cases.config(
            captioned, tmp_path / "resnet.safetensors", tmp_path / "run", "SOLVER.MAX_ITER", 1, *options, freeze
        )
        for freeze in (False, True)
    ]
    trainer, _ = run(cfgs[0])
    saved = trainer.state_dict()
    del saved["settings"]["FREEZE_OUTPUT_AND_NORMS"]
    trainer.load_state_dict(saved)
    trainer.cfg = cfgs[1]
    with pytest.raises(DataError, match="other settings .CLIM.FREEZE_OUTPUT_AND_NORMS False, now True"):
        trainer.load_state_dict(saved)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_moving_average_is_what_is_published(tmp_path, weights, captioned, decay):
    """Also: gradients are clipped parameter by parameter where that is asked for."""
    options = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", decay, "SOLVER.MAX_ITER", 3]
    clipping = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"]
    trainer, _ = run(cases.config(captioned, weights, tmp_path, *options, *clipping))
    assert "GradientClip" in type(trainer.optimizer).__name__
    assert trainer.clip is trainer.checkpointer.model.clip and trainer.clip is not trainer._trained.clip
    pairs = zip(trainer.clip.visual.parameters(), trainer._trained.clip.visual.parameters(), strict=True)
    assert all(torch.equal(average, last) for average, last in pairs) == (decay == 0)


@pytest.mark.parametrize("override, words", [
    (("SOLVER.OPTIMIZER", "SGD"), "CLIM has AdamW"), (("SOLVER.LR_FACTORS", [["visual", 0.1]]), "one learning rate"),
    (("CLIM.AVERAGE", 1.5), "AVERAGE is 1.5"), (("CLIM.EVALUATION.DATASET", "coco"), "'coco' is not a registered"),
    (("CLIM.EVALUATION.DATASET", "ov_shapes_test"), "ov_shapes_test, which is held out .* Use ov_shapes_val_all"),
    (("CLIM.SINGLES", 5), "a batch of 7 images is smaller"), (("CLIM.CAPTIONS_EACH", 0), "an image needs a caption"),
    (("CLIM.GRIDS", [2, 3, 4]), "no mosaic of 3x3 or 4x4: give each process 32 images"),
    (("CLIM.FLIP", 2.0), "a chance"), (("CLIM.CROP_SCALE", [0.9, 0.5]), "the lower first"),
    (("CLIM.SHUFFLE_BUFFER", 0), "at least one sample"), (("SOLVER.WEIGHT_DECAY_NORM", 0.1), "do not decay"),
    (("SOLVER.BIAS_LR_FACTOR", 2.0), "same learning rate"),
])  # fmt: skip
def test_what_is_refused(tmp_path, weights, captioned, override, words):
    with pytest.raises(UsageError, match=words):
        check(cases.config(captioned, weights, tmp_path, *override), processes=1)


def test_an_evaluation_set_whose_files_are_missing_stops_before_training(weights, captioned, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        check(cases.config(captioned, weights, tmp_path, "CLIM.EVALUATION.DATASET", "ov_coco_val_all"), processes=1)


def test_batch_smaller_than_a_mosaic(tmp_path, weights, captioned):
    cfg = cases.config(captioned, weights, tmp_path, "SOLVER.IMS_PER_BATCH", 5, "CLIM.GRIDS", "[3]")
    with pytest.raises(UsageError, match="a batch of 5 images is smaller than one mosaic of 3x3 with 3 single"):
        run(cfg)


def test_a_wrong_canvas_is_said_before_captions_are_embedded(tmp_path, weights, captioned):
    cfg = cases.config(captioned, weights, tmp_path, "CLIM.CANVAS", 50)
    with pytest.raises(UsageError, match="CLIM.CANVAS is 50"):
        prepare(cfg)
    assert not list(tmp_path.glob("captions*"))


@pytest.mark.parametrize("canvas, grids, nearest", [(50, (2,), 48), (24, (4,), 32), (1000, (2, 3), 1000)])
def test_canvas_that_does_not_fit_the_stride(canvas, grids, nearest):
    if canvas == nearest:
        model_of(grids=grids, canvas=canvas)
        return
    with pytest.raises(UsageError, match=f"CLIM.CANVAS is {canvas}.*every 8 px.*nearest is {nearest}"):
        model_of(grids=grids, canvas=canvas)


@pytest.mark.parametrize("name, blocks", [("clim-vit", 0), ("clim-vit", 4), ("clim-resnet", 5), ("clim-vit", -2)])
def test_blocks_that_are_not_there(name, blocks):
    with pytest.raises(UsageError, match=f"TRAINABLE_BLOCKS is {blocks}"):
        model_of(name, blocks, canvas=128)


def test_weights_of_another_architecture_or_resolution(tmp_path, weights):
    with pytest.raises(
        DataError, match="of clim-vit-wide could not be loaded .*size mismatch.*ARCHITECTURE, --architecture. must be"
    ):
        Teacher.load("clim-vit-wide", weights)
    with pytest.raises(DataError, match=r"another resolution than clim-vit-64px.*\[17, 32\], not \[65, 32\]"):
        Teacher.load("clim-vit-64px", weights)
    torch.save({f"module.{name}": t for name, t in cases.clip_of("clim-vit").state_dict().items()}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"another resolution than clim-vit-64px.*\[17, 32\], not \[65, 32\]"):
        Teacher.load("clim-vit-64px", tmp_path / "w.pt")
    with pytest.raises(UsageError, match="no architecture 'clim-none'"):
        Teacher.load("clim-none", weights)
    (tmp_path / "w.safetensors").write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(DataError, match="no complete safetensors file"):
        Teacher.load("clim-vit", tmp_path / "w.safetensors")


def test_text_table_of_another_model_stops_a_run(tmp_path, weights, captioned):
    cfg = cases.config(captioned, weights, tmp_path)
    build_text_table(tmp_path / "captions.safetensors", build_source(cfg), cases.teacher_of("clim-vit-wide"))
    with pytest.raises(DataError, match="the text table .*clim-vit-wide.*cannot be compared"):
        run(cfg)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_average(weight):
    trained = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    original = {"w": torch.tensor([3.0, -2.0]), "n": torch.tensor(1)}
    found = averaged(trained, original, weight)
    torch.testing.assert_close(found["w"], torch.tensor([3 - 2 * weight, -2 + 4 * weight]))
    assert found["n"] == 3
    with pytest.raises(DataError, match="w differs"):
        averaged(trained, {"w": torch.zeros(3), "n": torch.tensor(1)}, weight)
    with pytest.raises(UsageError, match="CLIM.AVERAGE is 1.2"):
        averaged(trained, original, 1.2)


def test_published_weights_are_a_teacher(tmp_path, weights):
    """open_clip and Teacher load the file; its fingerprint is what it states, and another than the original's."""
    original, trained = Teacher.load("clim-vit", weights), Teacher.load("clim-vit", weights)
    with torch.no_grad():
        trained.clip.visual.proj.mul_(2.0)
    path = tmp_path / "clim_a0.7.safetensors"
    stated = export(path, trained.clip, original, 0.7, {"iterations": 6})
    teacher = Teacher.load("clim-vit", str(path))
    assert teacher.fingerprint == stated and stated.weights_sha256 != original.fingerprint.weights_sha256
    torch.testing.assert_close(teacher.clip.visual.proj, original.clip.visual.proj * 1.7)
    assert teacher.interpolation == original.interpolation
    assert Teacher.load("clim-vit", path).fingerprint == stated
    with pytest.raises(DataError, match="is of the architecture clim-vit, not clim-vit-wide"):
        Teacher.load("clim-vit-wide", path)


@pytest.mark.parametrize("manifest", ["no json", "[]", '{"fingerprint": 1}'])
def test_what_another_program_states_does_not_matter(tmp_path, manifest):
    state = {name: tensor.contiguous() for name, tensor in cases.clip_of("clim-vit").state_dict().items()}
    save_file(state, str(tmp_path / "w.safetensors"), metadata={"manifest": manifest})
    assert Teacher.load("clim-vit", tmp_path / "w.safetensors").fingerprint.pretrained == "w.safetensors"


def test_quickgelu_is_in_the_name_of_a_file():
    """A tag says that weights need QuickGELU, a file cannot: under the plain name it would be loaded with GELU."""
    assert file_architecture("ViT-B-16", "openai") == "ViT-B-16-quickgelu"
    assert file_architecture("ViT-B-16-quickgelu", "openai") == "ViT-B-16-quickgelu"
    assert file_architecture("clim-vit", "w.safetensors") == "clim-vit"
    assert file_architecture("ViT-B-16", "laion2b_s34b_b88k") == "ViT-B-16"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as models:
        cases.register_models(Path(models))
        GOLDEN.mkdir(exist_ok=True)
        for name in GOLDEN_CASES:
            tensors = {key: tensor.contiguous() for key, tensor in golden_tensors(name).items()}
            save_file(tensors, str(GOLDEN / f"{name}.safetensors"))
