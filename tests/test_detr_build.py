"""OpenVocabularyDeformableDETR by configuration: its parts, a training run of a few steps, resumed and evaluated, and a
golden model."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from safetensors.torch import save_file

from ovdet2.config import get_cfg
from ovdet2.engine import Trainer
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import UsageError
from ovdet2.modeling.build import build_teacher
from tests import micro
from tests.micro_training import micro_cfg, write_data

GOLDEN = Path(__file__).parent / "golden" / "deformable_detr.safetensors"
SMALL = [
    "MODEL.META_ARCHITECTURE", "OpenVocabularyDeformableDETR", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']", "INPUT.FORMAT", "RGB",
    "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.DETR.IN_FEATURES", "['res4', 'res5']",
    "MODEL.DETR.LEVELS", "3", "MODEL.DETR.DIM", "64", "MODEL.DETR.HEADS", "4", "MODEL.DETR.POINTS", "2",
    "MODEL.DETR.FFN_DIM", "32", "MODEL.DETR.ENCODER_LAYERS", "1", "MODEL.DETR.DECODER_LAYERS", "2",
    "MODEL.DETR.NUM_QUERIES", "10", "MODEL.OVD.TEMPERATURE", "0.07",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["build_resnet_backbone", "build_timm_swin_backbone"])
def test_strides_are_those_of_the_maps(backbone):
    """Of two of the backbone and two coarser levels, for sides that no stride divides."""
    swin = ["MODEL.SWIN.ARCHITECTURE", "swin_tiny_patch4_window7_224", "MODEL.SWIN.OUT_FEATURES", "['res4', 'res5']"]
    network = model_of("MODEL.BACKBONE.NAME", backbone, "MODEL.DETR.LEVELS", "4", *swin).network
    maps, _ = network.features(torch.zeros(1, 3, 150, 230), [(150, 230)])
    assert network.strides == (16, 32, 64, 128)
    for level, stride in zip(maps, network.strides, strict=True):
        assert tuple(level.shape[-2:]) == (-(-150 // stride), -(-230 // stride))


def small_cfg(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list([*SMALL, *overrides])
    return cfg


def model_of(*overrides):
    from detectron2.modeling import META_ARCH_REGISTRY

    torch.manual_seed(0)
    cfg = small_cfg(*overrides)
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=micro.vocabulary())


@pytest.mark.parametrize("variant", ["one_stage", "refine", "two_stage", "plus_plus"])
def test_losses_and_gradients_of_every_variant(variant):
    model = model_of("MODEL.DETR.VARIANT", variant, "MODEL.BACKBONE.FREEZE_AT", "0")
    losses = model(micro.images())
    places = ["", "_0"] + (["_encoder"] if variant in ("two_stage", "plus_plus") else [])
    assert set(losses) == {f"loss_{kind}{place}" for kind in ("class", "l1", "giou") for place in places}
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize("variant", ["one_stage", "refine", "two_stage", "plus_plus"])
def test_batch_equals_singles(variant):
    """At test and in the losses, for images of one size: convolutions and group norm see the padding of another."""
    model = model_of("MODEL.DETR.VARIANT", variant, "MODEL.DETR.DROPOUT", "0.0").eval()
    records = micro.images(3)[::2]
    for output, record in zip(model(records), records):
        [single] = model([record])
        single, output = single["instances"], output["instances"]
        assert torch.allclose(single.scores, output.scores, atol=1e-5)
        # Pairs of nearly one score may change places: of each batch's box the nearest single one counts.
        apart = torch.cdist(output.pred_boxes.tensor, single.pred_boxes.tensor, p=1).min(dim=1).values
        assert apart.max() < 0.05, apart
    model.train()
    batch = model(records)
    singles = [model([record]) for record in records]
    for name, value in batch.items():
        assert value.item() == pytest.approx((singles[0][name] + singles[1][name]).item() / 2, rel=1e-3)


@pytest.mark.parametrize("setting, words", [
    (("MODEL.DETR.IN_FEATURES", "['res4']"), "returns res5, which MODEL.DETR.IN_FEATURES"),
    (("MODEL.DETR.DIM", "48"), "DIM 48"),
    (("MODEL.DETR.DECODER_LAYERS", "0"), "DECODER_LAYERS 0"),
    (("MODEL.DETR.ATTENTION_KERNEL", "cuda"), "ATTENTION_KERNEL is 'cuda': choose auto, bag"),
    (("MODEL.OVD.FEDERATED_WORDS", "50", "MODEL.MASK_ON", "True"), "has no MODEL.MASK_ON, MODEL.OVD.FEDERATED_WORDS"),
])  # fmt: skip
def test_settings_that_do_not_fit(setting, words):
    with pytest.raises(UsageError, match=words):
        model_of(*setting)


def test_the_kernel_is_that_of_the_configuration():
    layers = [
        layer for layer in model_of("MODEL.DETR.ATTENTION_KERNEL", "grid_sample").modules() if hasattr(layer, "kernel")
    ]
    assert [layer.kernel for layer in layers] == ["grid_sample"] * 3


def test_closed_set_has_a_column_for_every_word():
    model = model_of("MODEL.OVD.CLASSIFIER", "closed_set")
    assert torch.isfinite(sum(model(micro.images()).values()))
    model.eval().vocabulary.set(micro.vocabulary(names=("star",), num_base=0))
    with pytest.raises(UsageError, match="5 classes cannot take 1 words"):
        model(micro.images())
    with pytest.raises(UsageError, match="DISTRACTORS"):
        model_of("MODEL.OVD.CLASSIFIER", "closed_set", "TEST.DISTRACTORS", "['sky']")


def test_words_of_another_number_and_one_copy_in_the_checkpoint(tmp_path):
    model = model_of()
    AtomicCheckpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert [name for name in saved if name.endswith("embeddings")] == ["vocabulary.embeddings"]
    other = model_of()
    other.vocabulary.set(micro.vocabulary(names=("star", "moon"), num_base=2))
    AtomicCheckpointer(other).load_all(str(tmp_path / "model.pth"))
    assert other.vocabulary.names == ("star", "moon")
    assert other.eval()(micro.images())[0]["instances"].pred_classes.max() == 1


def test_averaged_copy_has_words_of_its_own():
    """A moving average is a deep copy of the model: its classifier must not read the other's words."""
    import copy

    model = model_of().eval()
    average = copy.deepcopy(model)
    average.vocabulary.set(micro.vocabulary(names=("star",), num_base=0))
    assert set(average(micro.images())[0]["instances"].pred_classes.tolist()) == {0}
    assert len(set(model(micro.images())[0]["instances"].pred_classes.tolist())) > 1


@pytest.mark.parametrize("overrides, words", [
    (["MODEL.DETR.IN_FEATURES", "['res3']"], "IN_FEATURES.*res4, res5"),
    (["MODEL.DETR.LEVELS", "1"], "one to 1"),
    (["MODEL.OVD.CLASSIFIER", "other"], "closed_set"),
    (["MODEL.DETR.VARIANT", "three_stage"], "three_stage"),
])  # fmt: skip
def test_settings_that_do_not_go_together(overrides, words):
    with pytest.raises(UsageError, match=words):
        model_of(*overrides)


@pytest.mark.slow
def test_training_run_is_resumed_exactly_and_evaluated(tmp_path, monkeypatch):
    """With DETR's crop, learning rates by name, clipping, bfloat16 and the moving average."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    options = [
        *SMALL, "MODEL.TEACHER.ARCHITECTURE", "ovshapes-resnet", "MODEL.TEACHER.PRETRAINED", "embedded",
        "MODEL.VOCABULARY.TEMPLATES", "single", "INPUT.DETR_CROP.ENABLED", "True", "INPUT.DETR_CROP.RESIZE", "(56, 64)",
        "INPUT.DETR_CROP.SIDES", "(40, 60)", "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001",
        "SOLVER.LR_FACTORS", "[['backbone', 0.1], ['reference|sampling_offsets', 0.1]]",
        "SOLVER.WARMUP_ITERS", "0", "SOLVER.CLIP_GRADIENTS.ENABLED", "True",
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.1", "SOLVER.AMP.ENABLED", "True", "SOLVER.EMA.ENABLED", "True",
        "SOLVER.EMA.DECAY", "0.5", "SOLVER.CHECKPOINT_PERIOD", "2", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "True",
    ]  # fmt: skip

    def run(output, iterations, resume=False):
        cfg = micro_cfg(tmp_path / output, [*options, "SOLVER.MAX_ITER", str(iterations)])
        build_teacher(cfg)  # which draws random numbers, but once per process
        seed_all_rng(0)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return trainer

    straight = run("straight", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume=True)
    for mine, theirs in zip(resumed._trainer.model.parameters(), straight._trainer.model.parameters()):
        assert torch.equal(mine, theirs)
    assert "AP50-novel" in straight._last_eval_results["bbox"]


def test_is_built_by_name():
    cfg = small_cfg("MODEL.TEACHER.ARCHITECTURE", "ovshapes-resnet", "MODEL.TEACHER.PRETRAINED", "embedded")
    cfg.DATASETS.TEST, cfg.MODEL.VOCABULARY.TEMPLATES = ("ov_shapes_val_all",), "single"
    assert len(build_model(cfg).vocabulary) == 65


def golden():
    """Losses, two gradients, and what each variant finds, of weights that no random generator made."""
    found = {}
    for variant in ("refine", "plus_plus"):
        model = model_of("MODEL.DETR.VARIANT", variant, "MODEL.DETR.DROPOUT", "0.0")
        with torch.no_grad():
            for number, parameter in enumerate(model.network.parameters()):
                if parameter.ndim > 1:
                    wave = micro.wave(parameter.shape, 0.3 + 0.01 * number)
                    parameter.copy_(wave * (1.5 / parameter[0].numel() ** 0.5))
        losses = model(micro.images())
        sum(losses.values()).backward()
        found |= {f"{variant}.{name}": value.detach() for name, value in losses.items()}
        for name in ("network.neck.levels.2.0.weight", "network.class_branches.1.projection.weight"):
            found[f"{variant}.gradient.{name}"] = model.get_parameter(name).grad.flatten()[:200].clone()
        with torch.no_grad():
            _, outputs, _ = model.eval().infer(micro.images())
        found |= {f"{variant}.{name}": getattr(outputs, name).clone() for name in ("pred_logits", "pred_boxes")}
    return found


def test_golden():
    found = golden()
    scale = max(value.abs().max().item() for name, value in found.items() if "gradient" in name)
    micro.assert_golden(GOLDEN, found, gradient_atol=1e-3 * scale)


if __name__ == "__main__":
    save_file(golden(), str(GOLDEN))
