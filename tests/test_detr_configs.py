"""The configurations of Deformable DETR: each builds, and trains what at which rate its recipe says."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ovdet2.config import load_config
from ovdet2.engine.optimizer import build_optimizer, full_model_norm
from ovdet2.modeling.build import build_vocabulary
from tests import micro

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.stem.startswith("deformable_detr")
)
NARROW = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DETR.DIM", "32", "MODEL.DETR.HEADS", "4",
    "MODEL.DETR.FFN_DIM", "16", "MODEL.DETR.NUM_QUERIES", "10", "MODEL.RESNETS.DEPTH", "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.SWIN.ARCHITECTURE", "swin_tiny_patch4_window7_224",
    "MODEL.SWIN.WEIGHTS", "",
]  # fmt: skip


def built(name, *overrides):
    cfg = load_config(name, overrides)
    return cfg, META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=micro.vocabulary())


def rates(cfg, model):
    """{name of a trained parameter: (learning rate, weight decay)}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def detr_models():
    """{name: MODEL as its yaml files write it} of the configurations of the DETR host; defaults are not filled in."""
    models = {path: CfgNode.load_yaml_with_base(str(path)).get("MODEL", {}) for path in CONFIGS.rglob("*.yaml")}
    return {
        str(path.relative_to(CONFIGS)): model
        for path, model in models.items()
        if model.get("META_ARCHITECTURE") == "OpenVocabularyDeformableDETR"
    }


def test_all_without_a_method_are_found_by_their_name():
    """Those of OV-Shapes have other rates."""
    without = {name for name, model in detr_models().items() if not {"CCKT", "CLIP_DETR"} & set(model)}
    assert set(NAMES) == {name for name in without if "ovshapes" not in name} and NAMES


@pytest.mark.parametrize("name", NAMES)
def test_narrowed_it_builds_and_detects_with_its_rates(name):
    embedded = ["MODEL.TEACHER.ARCHITECTURE", "ovshapes-resnet", "MODEL.TEACHER.PRETRAINED", "embedded"]
    cfg, model = built(name, *NARROW, *(embedded if "clip" in name else ()))
    found = rates(cfg, model)
    for parameter, (rate, decay) in found.items():
        slow = any(part in parameter for part in ("backbone", "sampling_offsets", "query_maker.reference"))
        assert (rate, decay) == (pytest.approx(2e-5 if slow else 2e-4), 1e-4), parameter
    assert {any(part in parameter for parameter in found) for part in ("backbone", "sampling_offsets")} == {True}
    assert full_model_norm(cfg) == 0.1
    frozen = [parameter for parameter, p in model.named_parameters() if not p.requires_grad]
    assert all(parameter.startswith("network.backbone.") for parameter in frozen)
    with torch.no_grad():
        outputs = model.eval()(micro.images())
    assert all(0 < len(output["instances"]) <= cfg.TEST.DETECTIONS_PER_IMAGE for output in outputs)


def test_the_whole_r50_has_the_published_size():
    """40 M parameters, and statistics, stem and first stage frozen."""
    cfg, model = built("coco/deformable_detr_r50.yaml", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu")
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e6 == pytest.approx(40, abs=0.5)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(".stem." in name or ".res2." in name for name in trained) and any(
        ".res3." in name for name in trained
    )
    assert {type(module).__name__ for module in model.modules() if "BatchNorm" in type(module).__name__} == {
        "FrozenBatchNorm2d"
    }


def test_the_closed_set_needs_no_weights_of_clip(tmp_path, monkeypatch):
    from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
    from tests.test_registries import truth, write

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    pairs = sorted((*OV_COCO.base, *OV_COCO.novel, *OV_COCO_UNUSED))
    categories = [{"id": category_id, "name": name} for category_id, name in pairs]
    whole = truth(categories, tmp_path / "coco" / "val2017")
    write(tmp_path / "coco" / "annotations" / "instances_val2017.json", whole)
    vocabulary = build_vocabulary(load_config("coco/deformable_detr_r50.yaml"))
    assert (len(vocabulary), vocabulary.num_base) == (80, 80)


def test_plus_plus_has_the_width_of_the_public_codes():
    """2,048 in all configurations of Deformable DETR++ at full scale, the rows of CLIP-DETR included; 1,024 elsewhere."""
    widths = {}
    for path in CONFIGS.rglob("*.yaml"):
        cfg = load_config(str(path))
        if (
            path.parent.name not in ("base", "ovshapes")
            and cfg.MODEL.META_ARCHITECTURE == "OpenVocabularyDeformableDETR"
        ):
            widths.setdefault(cfg.MODEL.DETR.VARIANT, {})[path] = cfg.MODEL.DETR.FFN_DIM
    assert set(widths["plus_plus"].values()) == {2048} and len(widths["plus_plus"]) == 10
    assert {width for variant in ("one_stage", "refine", "two_stage") for width in widths[variant].values()} == {1024}
