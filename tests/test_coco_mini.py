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
    table = ["--import-table", SHARED / "clip_text" / "coco_clip_a+cname.npy"]
    rows = ["--json", root / "coco" / "annotations" / "instances_val2017.json", "--templates", "a {name}"]
    teacher = ["--architecture", "ViT-B-32", "--pretrained", "openai", "--output", root / "v.safetensors"]
    program(root, "tools/build_vocabulary.py", "--dataset", "ov_coco_val_all", *table, *rows, *teacher)
    return root


def test_fifty_steps_evaluate_and_draw(root, tmp_path):
    config = ["--config-file", "configs/ovcoco/vild_r50.yaml"]
    small = [*shlex.split(SMALL), "MODEL.VOCABULARY.FILE", root / "v.safetensors"]
    program(root, "train_net.py", *config, *small, "OUTPUT_DIR", tmp_path / "run")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    losses = [step["total_loss"] for step in steps if "total_loss" in step]
    fifth = max(1, len(losses) // 5)
    assert sum(losses[-fifth:]) < 0.9 * sum(losses[:fifth]), losses
    report = json.loads((tmp_path / "run" / "inference" / "ov_coco_val_all" / "report.json").read_text())
    assert report["images"] == 38
    assert report["classes"]["base"]["boxes"] + report["classes"]["novel"]["boxes"] <= 328
    weights = ["MODEL.WEIGHTS", tmp_path / "run" / "model_final.pth"]
    photographs = SHARED / "coco_mini" / "val2017"
    drawing = ["--input", photographs, "--output", tmp_path / "out", "--confidence-threshold", "0.02"]
    printed = program(root, "demo/demo.py", *config, *drawing, *small, *weights)
    assert "42 images" in printed
    assert len(list((tmp_path / "out").glob("*.png"))) == 42
