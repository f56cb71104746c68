"""The configurations of CLIP-DETR: each builds its baseline with the parts it names, and trains a step."""

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from ovdet2.config import load_config
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.engine.optimizer import build_optimizer
from ovdet2.methods.cckt.tests.cckt_cases import samples
from tests import micro
from tests.test_detr_configs import CONFIGS, NARROW, detr_models

NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("clip_detr*.yaml"))
NARROW = [*NARROW, "MODEL.CLIP_DETR.LABEL_TABLE", "", "MODEL.TEACHER.ARCHITECTURE", "ovshapes-resnet",
          "MODEL.TEACHER.PRETRAINED", "embedded"]  # fmt: skip


def test_all_with_a_part_of_clip_detr_are_found_by_their_name():
    parts = {name: model.get("CLIP_DETR", {}) for name, model in detr_models().items()}
    weights = {name: (part.get("ALIGN_WEIGHT", 0), part.get("DYNAMIC_WEIGHT", 0)) for name, part in parts.items()}
    assert set(NAMES) == {name for name, pair in weights.items() if any(pair)} and NAMES


@pytest.mark.parametrize("name", NAMES)
def test_narrowed_it_trains_the_parts_it_names(name):
    cfg = load_config(name, NARROW)
    clip, (folder, stem) = cfg.MODEL.CLIP_DETR, name.removesuffix(".yaml").split("/")
    aligned = 0.25 if folder == "ovshapes" else 1.0
    assert (clip.ALIGN_WEIGHT, clip.DYNAMIC_WEIGHT) == (aligned * ("dynql" not in stem), float("align" not in stem))
    assert load_config(name).OUTPUT_DIR == f"output/{folder}/{stem.removesuffix('_r18')}"
    torch.manual_seed(0)
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=micro.vocabulary())
    assert (model.clip_detr.align_net is None, model.clip_detr.dynamic_queries is None) == (
        "dynql" in stem, "align" in stem
    )  # fmt: skip
    trained = {p for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    assert set(model.clip_detr.parameters()) <= trained
    losses = model(samples(1, words=((1,),)))
    assert torch.isfinite(sum(losses.values()))
    assert ("loss_align" in losses, "loss_class_dynamic" in losses) == ("dynql" not in stem, "align" not in stem)


def test_large_scale_jitter_is_the_only_difference_of_the_two_rows_of_lvis():
    plain, jittered = (load_config(f"lvis/clip_detr_r50_12ep{end}.yaml") for end in ("", "_lsj"))
    assert jittered.INPUT.LSJ.ENABLED and not jittered.INPUT.DETR_CROP.ENABLED and plain.INPUT.DETR_CROP.ENABLED
    names = [type(part).__name__ for part in build_sample_maker(jittered, True).steps[1].augmentations.augs]
    assert names == ["ResizeScale", "FixedSizeCrop", "RandomFlip"]
    jittered.INPUT, jittered.OUTPUT_DIR = plain.INPUT, plain.OUTPUT_DIR
    assert jittered == plain


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ovshapes")])
def test_rows_of_ov_shapes_differ_from_their_baseline_in_the_parts_alone(name):
    baselines = {"closed": "detr_closed_set_r18", "text": "detr_text_r18", "cckt": "cckt_full_r18"}
    [baseline] = [baseline for part, baseline in baselines.items() if part in name]
    cfg, plain = load_config(name), load_config(f"ovshapes/{baseline}.yaml")
    assert cfg.TEST.EXPECTED_RESULTS == [] or cfg.TEST.EXPECTED_RESULTS != plain.TEST.EXPECTED_RESULTS
    cfg.TEST.EXPECTED_RESULTS = []
    plain.MODEL.CLIP_DETR, plain.OUTPUT_DIR, plain.TEST.EXPECTED_RESULTS = cfg.MODEL.CLIP_DETR, cfg.OUTPUT_DIR, []
    assert cfg == plain
