"""Every configuration that trains takes two steps on eight drawn images, and is evaluated on two, by the trainer.

The files of COCO and LVIS are imitations: OV-Shapes, whose classes have COCO's category ids, with COCO's names. The teachers
are the embedded ones. Trunks have no pre-trained weights, R50 and Swin are the smallest of their kind, and widths are
narrowed; everything else is that of the yaml.
"""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch import nn

from ovdet2.config import load_config
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.data.datasets.ov_shapes_captions import ensure_captions
from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.engine import Trainer
from ovdet2.programs import build_caption_cache, build_concept_priors, build_region_cache

ROOT = Path(__file__).resolve().parents[1]
# CLIM's configurations have keys of that project, and a trainer: projects/CLIM/tests trains them.
FILES = sorted(
    path
    for path in (*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "projects").glob("*/configs/*.yaml"))
    if path.parent.parent.name != "CLIM"
)
# Without a training set: bases of others, and the networks of published weights of Detic and Detectron2, which are not trained here.
BASES = {"base/deformable_detr_r50", "base/detic", "base/fvlm_fpn", "base/vild_fpn"}
LEARNING = ("detic_boxes_", "detic_tags_", "detic_captions_", "detic_both_")
PUBLISHED = {
    f"{path.parent.name}/{path.stem}"
    for path in FILES
    if path.stem.startswith(("detic_", "clip_on_crops_r50")) and not path.stem.startswith(LEARNING)
}
NETWORKS = BASES | PUBLISHED
# The data set that a training is evaluated on here. Those of configs/transfer are evaluated on others.
TESTS = {
    "closed_coco_2017_train": "closed_coco_2017_val",
    "closed_lvis_v1_train": "closed_lvis_v1_val",
    "ov_coco_train_base": "ov_coco_val_all",
    "ov_lvis_train_base": "ov_lvis_val",
    "ov_shapes_lvis_train_base": "ov_shapes_lvis_val",
    "ov_shapes_train_base": "ov_shapes_val_all",
}
STEPS, IMAGES = 2, 8
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VOCABULARY.TEMPLATES": "single",
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.MIX": "parallel",  # every step has all losses
    "SEED": 3,
    "SOLVER.MAX_ITER": STEPS,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.BASE_LR": 1e-3,  # with that of 64 images, two steps from random weights may diverge
    "SOLVER.AMP.ENABLED": False,
    "TEST.EXPECTED_RESULTS": [],
    "TEST.HTML_REPORT": False,
    "TEST.EVAL_PERIOD": 0,
    "TEST.PROPOSALS_PER_IMAGE": 0,
    "INPUT.MIN_SIZE_TEST": 96,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MAX_SIZE_TRAIN": 128,
    "INPUT.DETR_CROP.RESIZE": (112,),
    "INPUT.DETR_CROP.SIDES": (64, 112),
    "INPUT.LSJ.SIDE": 128,
    # Networks.
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.SWIN.ARCHITECTURE": "swin_tiny_patch4_window7_224",
    "MODEL.SWIN.WEIGHTS": "",
    "MODEL.DETR.DIM": 32,
    "MODEL.DETR.HEADS": 4,
    "MODEL.DETR.FFN_DIM": 16,
    "MODEL.DETR.NUM_QUERIES": 10,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 1_000_000,  # all anchors, so that each level of the pyramid has a loss
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 50,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 16,
}


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def trains(path):
    return not {name_of(path)} & NETWORKS


def renamed(data, names):
    """A COCO json with the categories ``names``, pairs of id and name."""
    return {**data, "categories": [{"id": number, "name": name} for number, name in sorted(names)]}


def with_polygons(data):
    """An LVIS json whose masks are the boxes: those of OV-Shapes are run-length codes, those of LVIS polygons."""
    for entry in data["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    return data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of data sets: OV-Shapes, and COCO and LVIS of its images and boxes."""
    root = tmp_path_factory.mktemp("datasets")
    ensure_generated(root, counts={"train2017": IMAGES, "val2017": 2}, workers=1)
    drawn, coco, lvis = root / "ov_shapes" / "annotations", root / "coco" / "annotations", root / "lvis"
    coco.mkdir(parents=True)
    lvis.mkdir()
    every = (*OV_COCO.base, *OV_COCO.novel, *OV_COCO_UNUSED)
    for part in ("train2017", "val2017"):
        shutil.copytree(root / "ov_shapes" / part, root / "coco" / part)
    for source, target, categories in (
        ("ov_shapes_train_base", "ov_coco_train_base", OV_COCO.base),
        ("ov_shapes_val_all", "ov_coco_val_all", (*OV_COCO.base, *OV_COCO.novel)),
        ("instances_train2017", "instances_train2017", every),
        ("instances_val2017", "instances_val2017", every),
    ):
        named = renamed(json.loads((drawn / f"{source}.json").read_text()), categories)
        (coco / f"{target}.json").write_text(json.dumps(named))
    captions, images = ensure_captions(root, IMAGES, workers=1)
    shutil.copy(captions, coco / "captions_train2017.json")
    shutil.copytree(images, coco.parent / "train2017", dirs_exist_ok=True)
    for name in ("lvis_v1_train", "lvis_v1_val", "ov_lvis_train_base"):
        (lvis / f"{name}.json").write_text(json.dumps(with_polygons(json.loads((drawn / f"{name}.json").read_text()))))
    return root


@pytest.fixture(scope="module")
def region_cache(data, tmp_path_factory):
    """Function of a data set, a kind of boxes and a teacher; gives the folder of a region cache, made once."""
    folder, made = tmp_path_factory.mktemp("caches"), {}

    def cache(dataset, kind, architecture):
        key = dataset, kind, architecture
        if key not in made:
            boxes = "annotations"
            if kind == "proposals":
                records = DatasetCatalog.get(dataset)
                found = [
                    {"image_id": record["image_id"], "category_id": 1, "bbox": [8.0 * i, 6.0, 40.0, 48.0], "score": 0.9 - 0.1 * i}
                    for record in records
                    for i in range(3)
                ]  # fmt: skip
                boxes = str(folder / f"{dataset}.json")
                Path(boxes).write_text(json.dumps(found))
            made[key] = str(folder / "-".join(key))
            build_region_cache.main([
                "--config-file", "ovshapes/vild_text_r18.yaml", "--dataset", dataset, "--boxes", boxes, "--workers", "0",
                "--architecture", architecture, "--pretrained", "embedded", "--output", made[key], "MODEL.DEVICE", "cpu",
            ])  # fmt: skip
        return made[key]

    return cache


@pytest.fixture(scope="module")
def caption_cache(data, tmp_path_factory):
    """Function of a data set of captions; gives its cache, made once."""
    folder = tmp_path_factory.mktemp("captions")

    def cache(dataset):
        path = folder / f"{dataset}.safetensors"
        if not path.is_file():
            build_caption_cache.main([
                "--dataset", dataset, "--architecture", "ovshapes-resnet", "--pretrained", "embedded", "--output", str(path),
            ])  # fmt: skip
        return str(path)

    return cache


def leaves(node, prefix=""):
    """(dotted key, value) of all keys of a configuration."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.fixture(scope="module")
def concept_prior(data, tmp_path_factory):
    """Function of a data set; gives a file with the annotated words of its images, made once."""
    folder = tmp_path_factory.mktemp("priors")

    def prior(dataset):
        path = folder / f"{dataset}.safetensors"
        if not path.is_file():
            build_concept_priors.main(["--backend", "oracle", "--dataset", dataset, "--output", str(path)])
        return str(path)

    return prior


def configured(path, region_cache, concept_prior, caption_cache, output):
    """The frozen configuration of a yaml, narrowed."""
    plain = load_config(str(path))
    tower = plain.MODEL.BACKBONE.NAME.startswith("build_clip")
    vit = tower and "vit" in plain.MODEL.TEACHER.ARCHITECTURE.lower()
    teacher = "ovshapes-vit" if vit else "ovshapes-resnet"
    [dataset] = plain.DATASETS.TRAIN
    overrides = {
        **SMALL,
        "OUTPUT_DIR": str(output),
        "DATASETS.TEST": (TESTS[dataset],),
        "MODEL.WEIGHTS": "",
        "MODEL.TEACHER.ARCHITECTURE": teacher,
        "MODEL.TEACHER.PRETRAINED": "embedded",
    }
    overrides["DATASETS.SOURCES"] = [
        {"name": entry["name"], "images": 2, "min_size": [96], "max_size": 128} for entry in plain.DATASETS.SOURCES
    ]
    if plain.DATASETS.CAPTION_CACHE:
        overrides["DATASETS.CAPTION_CACHE"] = caption_cache(plain.DATASETS.SOURCES[0]["name"])
    if plain.INPUT.SQUARE:
        overrides["INPUT.SQUARE"] = 128
    for key, value in leaves(plain):
        if value == "SyncBN":
            overrides[key] = "BN"  # one process has no statistics to share
        elif key.endswith(".LABEL_TABLE"):
            overrides[key] = ""  # of another teacher than the embedded one
        elif key.endswith(".PRIOR_FILE") and value:
            overrides[key] = concept_prior(TESTS[dataset])
        elif key.endswith(".REGION_CACHE") and value:
            kind = "annotations" if key.startswith("MODEL.CCKT.") else "proposals"
            overrides[key] = region_cache(dataset, kind, teacher)
    return load_config(str(path), [part for pair in overrides.items() for part in pair])


def test_all_that_have_a_data_set_are_trained():
    """A configuration without one is a base of others, or for published weights."""
    without = {name_of(path) for path in FILES if not load_config(str(path)).DATASETS.TRAIN}
    assert without == NETWORKS
    lines = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
    bases = {Path(line.split('"')[1]).stem for line in lines if line.startswith("_BASE_: ")}
    assert {name.split("/")[1] for name in BASES} <= bases and PUBLISHED


def has_gradient(parameter):
    """Whether the last step changed anything through it."""
    return parameter.grad is not None and bool(parameter.grad.any())


@pytest.mark.slow
@pytest.mark.parametrize("path", filter(trains, FILES), ids=name_of)
def test_two_steps(path, data, region_cache, concept_prior, caption_cache, tmp_path, monkeypatch):
    """Losses are finite, every trained weight has a gradient, frozen ones do not move, and a report is written."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    monkeypatch.chdir(ROOT)
    cfg = configured(path, region_cache, concept_prior, caption_cache, tmp_path)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    model = trainer.checkpointer.model
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    steps = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = {name: value for step in steps for name, value in step.items() if "loss" in name}
    assert trainer.iter == STEPS and losses
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values()), losses
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    idle = [name for name, parameter in model.named_parameters() if name in trained and not has_gradient(parameter)]
    # At ViLD's temperature of 0.01 an untrained softmax is 0 or 1, and may give the background no gradient.
    assert trained and not {*idle} - {"roi_heads.box_predictor.cls_score.background"}
    assert moved and moved <= trained  # not equal: steps of some norms are lost in rounding
    assert (tmp_path / "inference" / cfg.DATASETS.TEST[0] / "report.json").is_file()
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    del trainer, model
    gc.collect()
