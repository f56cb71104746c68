"""Real photographs and real CLIP text embeddings, from the official jsons to drawn detections. Slow: some minutes."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent"),
]
# From scratch at a small size: group norm instead of the frozen statistics that a pre-trained trunk would bring.
SMALL = """
MODEL.WEIGHTS "" MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.NORM GN MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 64
SOLVER.MAX_ITER 50 SOLVER.IMS_PER_BATCH 2 SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.WARMUP_ITERS 10
SOLVER.OPTIMIZER AdamW SOLVER.BASE_LR 0.0002 DATALOADER.NUM_WORKERS 0 SEED 0
INPUT.MIN_SIZE_TRAIN (192,) INPUT.MIN_SIZE_TEST 192 INPUT.MAX_SIZE_TEST 320 MODEL.RPN.POST_NMS_TOPK_TEST 100
"""
SMALL_DETR = """
MODEL.DETR.DIM 64 MODEL.DETR.FFN_DIM 128 MODEL.DETR.ENCODER_LAYERS 2 MODEL.DETR.DECODER_LAYERS 2
MODEL.DETR.NUM_QUERIES 50 MODEL.DETR.DROPOUT 0.0 INPUT.DETR_CROP.RESIZE (160,192) INPUT.DETR_CROP.SIDES (96,160)
SOLVER.STEPS (19,) SOLVER.MAX_ITER 20 SOLVER.WARMUP_ITERS 0 SOLVER.BASE_LR 0.001 TEST.DECODER_LAYERS True
"""


def program(root, *arguments):
    """Run a program of the project with ``root`` as the folder of data sets; returns its standard output."""
    environment = os.environ | {"DETECTRON2_DATASETS": str(root)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder of data sets with coco_mini as COCO, prepared, and the vocabulary of ViT-B/32."""
    root = tmp_path_factory.mktemp("datasets")
    shutil.copytree(SHARED / "coco_mini" / "annotations", root / "coco" / "annotations")
    (root / "coco" / "annotations").chmod(0o755)
    for split in ("train2017", "val2017"):
        (root / "coco" / split).symlink_to(SHARED / "coco_mini" / split)
    printed = program(root, "datasets/prepare_ov_coco.py")
    assert "339" in printed and "328" in printed
    for name, split in (("ov_coco_train_base", "train2017"), ("ov_coco_val_all", "val2017")):
        files = ["--json", root / "coco" / "annotations" / f"{name}.json", "--images", root / "coco" / split]
        program(root, "tools/check_dataset.py", *files, "--decode")
    table = ["--import-table", SHARED / "clip_text" / "coco_clip_a+cname.npy"]
    rows = ["--json", root / "coco" / "annotations" / "instances_val2017.json", "--templates", "a {name}"]
    teacher = ["--architecture", "ViT-B-32", "--pretrained", "openai", "--output", root / "v.safetensors"]
    program(root, "tools/build_vocabulary.py", "--dataset", "ov_coco_val_all", *table, *rows, *teacher)
    return root


def train(root, output, config, *overrides):
    """Train; returns the losses of metrics.json by name, each a list over the steps."""
    program(root, "train_net.py", "--config-file", f"configs/ovcoco/{config}", *overrides, "OUTPUT_DIR", output)
    steps = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    names = {name for step in steps for name in step if "loss" in name}
    return {name: [step[name] for step in steps if name in step] for name in names}


PROBE = """
import sys

import torch
from detectron2.utils.events import EventStorage

from ovdet2.config import load_config
from ovdet2.engine import Trainer

output = sys.argv[1]
for weights in ("", f"{output}/model_final.pth"):
    torch.manual_seed(0)
    trainer = Trainer(load_config(f"{output}/config.yaml", ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", f"{output}/probe"]))
    trainer.resume_or_load(resume=False)
    torch.manual_seed(0)
    with torch.no_grad(), EventStorage():
        print("probe", float(sum(trainer.model.train()(next(iter(trainer.data_loader))).values())))
"""


def probed(root, output):
    """Loss on the first training batch before and after training: that of other batches depends on their boxes."""
    printed = program(root, "-c", PROBE, output)
    return [float(line.split()[1]) for line in printed.splitlines() if line.startswith("probe ")]


def falls(losses):
    """Mean of the last fifth of the steps below 0.9 of the first fifth's."""
    fifth = max(1, len(losses) // 5)
    return sum(losses[-fifth:]) < 0.9 * sum(losses[:fifth])


def evaluate_and_draw(root, output, config, *overrides):
    """Check the report of a training and draw on the photographs with its weights."""
    report = json.loads((output / "inference" / "ov_coco_val_all" / "report.json").read_text())
    page = (output / "inference" / "ov_coco_val_all" / "report.html").read_text()
    assert "skateboard" in page and "data:image" in page
    assert report["images"] == 38
    assert report["classes"]["base"]["boxes"] + report["classes"]["novel"]["boxes"] <= 328
    drawing = ["--input", SHARED / "coco_mini" / "val2017", "--output", output / "drawn"]
    drawing += ["--confidence-threshold", "0.02", "--config-file", f"configs/ovcoco/{config}"]
    printed = program(root, "demo/demo.py", *drawing, *overrides, "MODEL.WEIGHTS", output / "model_final.pth")
    assert "42 images" in printed
    assert len(list((output / "drawn").glob("*.png"))) == 42


def test_vild_text_with_real_text_embeddings(root, tmp_path):
    small = [*shlex.split(SMALL), "MODEL.VOCABULARY.FILE", root / "v.safetensors"]
    losses = train(root, tmp_path, "vild_text_r50.yaml", *small)
    assert falls(losses["total_loss"]), losses
    evaluate_and_draw(root, tmp_path, "vild_text_r50.yaml", *small)


@pytest.fixture(scope="module")
def cached(root, tmp_path_factory):
    """Overrides with the embedded teacher and a region cache of the photographs. No weights of ViT-B/32 are at hand:
    the embedded teacher knows shapes and not cats, so its embeddings are real, their meaning is not."""
    output = tmp_path_factory.mktemp("cache")
    small = [
        *shlex.split(SMALL),
        "MODEL.TEACHER.ARCHITECTURE",
        "ovshapes-resnet",
        "MODEL.TEACHER.PRETRAINED",
        "embedded",
    ]
    train(
        root, output / "text", "vild_text_r50.yaml", *small, "SOLVER.MAX_ITER", "10"
    )  # an RPN that has begun to learn
    made = ["--config-file", "configs/ovcoco/vild_text_r50.yaml", "--dataset", "ov_coco_train_base"]
    made += ["--output", output / "cache", *small, "MODEL.WEIGHTS", output / "text" / "model_final.pth"]
    printed = program(root, "tools/build_region_cache.py", *made)
    assert "of 60 images" in printed
    return [*small, "MODEL.VILD.REGION_CACHE", output / "cache"]


@pytest.mark.parametrize("config", ["vild_r50.yaml", "vild_ensemble_r50.yaml"])
def test_vild_from_detector_to_cache_to_distillation(config, root, cached, tmp_path):
    losses = train(root, tmp_path, config, *cached)
    assert falls(losses["total_loss"]) and falls(losses["loss_distillation"]), losses
    evaluate_and_draw(root, tmp_path, config, *cached)


def test_deformable_detr_with_real_text_embeddings(root, tmp_path):
    """Twenty steps; AP of every decoder layer and the pictures of queries, too."""
    small = [*shlex.split(SMALL), *shlex.split(SMALL_DETR), "MODEL.VOCABULARY.FILE", root / "v.safetensors"]
    losses = train(root, tmp_path, "deformable_detr_r50.yaml", *small)
    assert falls(losses["total_loss"]), losses
    evaluate_and_draw(root, tmp_path, "deformable_detr_r50.yaml", *small)
    report = json.loads((tmp_path / "inference" / "ov_coco_val_all" / "report.json").read_text())
    assert len(report["decoder_layers"]) == 2
    last = report["decoder_layers"][-1]
    assert last == {name: report["bbox"][name] for name in last}
    photograph = sorted((SHARED / "coco_mini" / "val2017").glob("*.jpg"))[0]
    drawing = ["--config-file", "configs/ovcoco/deformable_detr_r50.yaml", "--input", photograph, "--queries", "2"]
    drawing += ["--output", tmp_path / "queries", *small, "MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    program(root, "tools/draw_queries.py", *drawing)
    assert len(list((tmp_path / "queries").glob(f"{photograph.stem}_query?.png"))) == 2


@pytest.fixture(scope="module")
def cckt(root):
    """Overrides of a small CCKT-Det, with its cache and its priors.

    ViT-B/32 by its architecture, its weights at random: its files are real, their meaning is not.
    """
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights, cached, priors = root / "ViT-B-32-random-weights.safetensors", root / "cache", root / "p.safetensors"
    save_file({k: v.contiguous() for k, v in open_clip.create_model("ViT-B-32").state_dict().items()}, str(weights))
    teacher = ["--architecture", "ViT-B-32", "--pretrained", weights]
    config = ["--config-file", "configs/ovcoco/cckt_r50.yaml"]
    cache = ["--dataset", "ov_coco_train_base", "--boxes", "annotations", "--output", cached, *teacher]
    program(root, "tools/build_region_cache.py", *config, *cache, "--scales", "1.0", "--workers", "0")
    made = ["--backend", "clip", "--dataset", "ov_coco_val_all", "--output", priors, *teacher]
    printed = program(root, "tools/build_concept_priors.py", *made, "--templates", "single", "--num-workers", "0")
    assert "38 images" in printed and "ViT-B-32-random-weights" in printed
    return [
        *shlex.split(SMALL), *shlex.split(SMALL_DETR),
        "MODEL.TEACHER.ARCHITECTURE", "ViT-B-32", "MODEL.TEACHER.PRETRAINED", weights,
        "MODEL.VOCABULARY.TEMPLATES", "single", "MODEL.CCKT.REGION_CACHE", cached, "MODEL.CCKT.PRIOR_FILE", priors,
    ]  # fmt: skip


def test_cckt_from_crops_and_priors_to_named_queries(root, cckt, tmp_path):
    """Thirty steps."""
    small = [*cckt, "SOLVER.STEPS", "(29,)", "SOLVER.MAX_ITER", "30"]
    losses = train(root, tmp_path, "cckt_r50.yaml", *small)
    assert falls(losses["total_loss"]) and "loss_contrast_0" in losses, losses
    evaluate_and_draw(root, tmp_path, "cckt_r50.yaml", *small)
    report = json.loads((tmp_path / "inference" / "ov_coco_val_all" / "report.json").read_text())
    assert report["concept_prior"]["kind"] == "prediction" and report["concept_prior"]["top"] == 6
    drawn = json.loads((tmp_path / "drawn" / "detections.json").read_text())
    assert all(len(image["present"]) == 6 for image in drawn)
    assert {d["prior"] for image in drawn for d in image["detections"]} <= {w for i in drawn for w in i["present"]}


@pytest.mark.parametrize("parts", [("1.0", "0.0"), ("0.0", "1.0"), ("1.0", "1.0")], ids=["align", "dynql", "both"])
@pytest.mark.parametrize("host", ["open_vocabulary", "closed_set", "cckt"])
def test_clip_detr(host, parts, root, cckt, tmp_path):
    """Twenty steps of each combination, on a host with learned positions, on CCKT-Det and on a two-stage one."""
    small = [*shlex.split(SMALL), *shlex.split(SMALL_DETR)]
    weights = ["MODEL.CLIP_DETR.ALIGN_WEIGHT", parts[0], "MODEL.CLIP_DETR.DYNAMIC_WEIGHT", parts[1]]
    if host == "open_vocabulary":
        table = root / "v.safetensors"
        tables = ["MODEL.VOCABULARY.FILE", table, "MODEL.CLIP_DETR.LABEL_TABLE", table]
        losses = train(root, tmp_path, "clip_detr_r50.yaml", *small, *weights, *tables)
    elif host == "closed_set":
        weights += ["MODEL.CLIP_DETR.LABEL_TABLE", ""]
        losses = train(root, tmp_path, "../coco/clip_detr_r50_12ep.yaml", *small, *weights)
    else:
        losses = train(root, tmp_path, "cckt_r50.yaml", *cckt, *weights)
        assert "loss_contrast_0" in losses
    assert ("loss_align" in losses, "loss_class_dynamic" in losses) == (parts[0] != "0.0", parts[1] != "0.0")
    before, after = probed(root, tmp_path)
    assert after < 0.9 * before, losses
