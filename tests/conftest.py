"""Fixtures of several files."""

import json
import os
import sys
import uuid

# Before torch is imported. The runs of several test processes share the cores, and sums depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import open_clip
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import settings
from safetensors.torch import save_file

from ovdet2.data.datasets.register import register_dataset
from ovdet2.engine import launch
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.vlm.teacher import Teacher
from tests.evaluation_sets import SPLIT
from tests.processes import quick_elastic_launch

# The same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

MICRO_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def quick_launch(monkeypatch):
    """`launch` starts its processes from the fork server of tests/processes.py."""
    launching = sys.modules[launch.__module__]  # ovdet2.engine.launch is the function
    monkeypatch.setattr(launching, "elastic_launch", quick_elastic_launch)


@pytest.fixture(scope="session")
def micro_clip_weights(tmp_path_factory):
    """A local weight file of a made-up architecture, "micro-clip"."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "micro-clip.json").write_text(json.dumps(MICRO_CLIP))
    open_clip.add_model_config(folder / "micro-clip.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model("micro-clip")
    save_file({k: v.contiguous() for k, v in clip.state_dict().items()}, str(folder / "w.safetensors"))
    return folder / "w.safetensors"


@pytest.fixture(scope="session")
def micro_teacher(micro_clip_weights):
    """A CLIP of random weights: 32 px, 16 dimensions."""
    return Teacher.load("micro-clip", str(micro_clip_weights))


@pytest.fixture
def registered(tmp_path):
    """Registers a json for the time of a test and gives its name; further arguments are register_dataset's."""
    names = []

    def register(data, split=SPLIT, **options):
        name = f"test_{uuid.uuid4().hex}"
        names.append(name)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        register_dataset(name, path, tmp_path, split, **options)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def make_evaluator(registered, tmp_path):
    """Registers a json and gives its evaluator, reset; further arguments are the evaluator's."""

    def make(data, split=SPLIT, folder="out", metric="ov_coco", masks=False, **options):
        evaluator = OpenVocabularyEvaluator(
            registered(data, split, metric=metric, masks=masks), tmp_path / folder, **options
        )
        evaluator.reset()
        return evaluator

    return make
