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
# Runs the program in a process of its own for each folder. What every one of them imports, beside the package that
# differs, is imported once before: that takes longer than the program.
HOST = """
import os
import sys

import detectron2.engine
import open_clip
import pytest
import scipy.optimize
import timm

assert not {"ovdet2", "tests"} & set(sys.modules)
program, *folders = sys.argv[1:]
for folder in folders:
    if not (child := os.fork()):
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
        os.chdir(folder)
        sys.path.insert(0, folder)
        exec(compile(program, "PROGRAM", "exec"), {"__name__": "__main__"})
        sys.exit()
    _, status = os.waitpid(child, 0)
    with open(f"{folder}/status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(status)))
"""
MARKS = {
    "vild": ["loss_distillation"],
    "cckt": ["loss_contrast"],
    "clip_detr": ["loss_align", "loss_class_dynamic"],
}


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """{removed method: folder of the checkout without it, with status, stdout and stderr of the program there}."""
    folders = {name: tmp_path_factory.mktemp(f"without_{name}") for name in METHODS}
    for removed, folder in folders.items():
        # With their __pycache__, which spares the compilation.
        shutil.copytree(ROOT / "ovdet2", folder / "ovdet2", ignore=shutil.ignore_patterns(removed))
        shutil.copytree(ROOT / "configs", folder / "configs")
        shutil.copy(ROOT / "train_net.py", folder)
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("golden"))
    subprocess.run([sys.executable, "-c", HOST, PROGRAM, *map(str, folders.values())], cwd=folder, check=True)
    return folders


@pytest.mark.parametrize("removed", METHODS)
def test_the_others_train_without_it(removed, checkouts):
    status, printed, errors = ((checkouts[removed] / name).read_text() for name in ("status", "stdout", "stderr"))
    assert status == "0", errors[-3000:]
    package, *left = printed.splitlines()[0].split()
    assert package == str(checkouts[removed] / "ovdet2")
    assert left == [name for name in METHODS if name != removed]
    for name, losses in MARKS.items():
        assert all((loss in printed) == (name != removed) for loss in losses)
