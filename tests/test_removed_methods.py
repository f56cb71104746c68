"""Each method is a directory: without it the others train, and its keys are gone."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.parent.name for path in (ROOT / "ovdet2" / "methods").glob("*/__init__.py"))

# One training step, and detections, of a micro model of every method that is left.
PROGRAM = """
import sys
from pathlib import Path

import torch
from detectron2.utils.events import EventStorage

import ovdet2
from ovdet2.config import find_methods, get_cfg
from ovdet2.data.samples import as_samples
from tests import micro
from tests.test_detr_build import model_of

left = [method.name for method in find_methods()]
print(Path(ovdet2.__file__).parent, *left)


def step(detector, samples):
    with EventStorage():
        losses = detector.train()(samples)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    with torch.no_grad():
        assert len(detector.eval()(samples)) == len(samples)
    print(*losses)


cfg, samples = micro.cfg(), as_samples(micro.images(2))
if "vild" in left:
    from ovdet2.methods.vild.sample import CachedRegions

    cfg.MODEL.VILD.WEIGHT = 0.5
    for sample in samples:
        rows = torch.nn.functional.normalize(micro.wave((2, 8)), dim=1).half()
        sample.attach(CachedRegions(sample.instances.gt_boxes.tensor, rows))
step(micro.model(config=cfg), samples)
overrides = []
if "cckt" in left:
    from ovdet2.methods.cckt.sample import ObjectCrops, PresentWords

    overrides += ["MODEL.CCKT.ENABLED", "True"]
    for sample in samples:
        rows = torch.nn.functional.normalize(micro.wave((2, 8)), dim=1).half()
        sample.attach(ObjectCrops(rows, torch.tensor([True, True])))
        sample.attach(PresentWords(torch.tensor([0, 1])))
if "clip_detr" in left:
    overrides += ["MODEL.CLIP_DETR.ALIGN_WEIGHT", "1.0", "MODEL.CLIP_DETR.DYNAMIC_WEIGHT", "1.0"]
step(model_of(*overrides), samples)
if "fvlm" in left:
    from ovdet2.methods.fvlm.tests.fvlm_cases import cfg as frozen_cfg, model as frozen_model

    step(frozen_model("resnet"), as_samples(micro.images(2)))
"""
MARKS = {
    "vild": ["loss_distillation"],
    "cckt": ["loss_contrast"],
    "clip_detr": ["loss_align", "loss_class_dynamic"],
}


@pytest.mark.parametrize("removed", METHODS)
def test_the_others_train_without_it(removed, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", removed)
    shutil.copytree(ROOT / "ovdet2", tmp_path / "ovdet2", ignore=ignored)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "train_net.py", tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden"))
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    package, *left = done.stdout.splitlines()[0].split()
    assert package == str(tmp_path / "ovdet2")
    assert left == [name for name in METHODS if name != removed]
    for name, losses in MARKS.items():
        assert all((loss in done.stdout) == (name != removed) for loss in losses)
