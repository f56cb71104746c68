"""Training on boxes and captions of OV-Shapes at once: both are learned from, and a killed run resumes bit for bit."""

import json
import signal

import pytest
import torch

from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.data.datasets.ov_shapes_captions import ensure_captions
from tests.processes import run_program

OPTIONS = [
    "MODEL.PARTS", "['tests.caption_method']", "MODEL.DEVICE", "cpu", "MODEL.VOCABULARY.TEMPLATES", "single",
    "DATASETS.SOURCES", "[{'name': 'ov_shapes_captions', 'images': 2, 'min_size': [96], 'max_size': 96}]",
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_WORLD_SIZE", "0", "SOLVER.MAX_ITER", "5",
    "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.CHECKPOINTS_TO_KEEP", "0", "TEST.EXPECTED_RESULTS", "[]",
    "TEST.HTML_REPORT", "False", "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.PROPOSALS_PER_IMAGE", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder of data sets: 12 images with boxes, 10 with captions."""
    folder = tmp_path_factory.mktemp("datasets")
    ensure_generated(folder, counts={"train2017": 12, "val2017": 2}, workers=1)
    ensure_captions(folder, 10, workers=1)
    return folder


def train(root, output, *options, config="ovshapes/vild_text_r18.yaml", processes=1, resume=False):
    """Run the training program as a user would; returns what it printed."""
    command = ["train_net.py", "--config-file", config, "--num-gpus", processes]
    command += [*(["--resume"] if resume else []), *OPTIONS, "OUTPUT_DIR", output, *options]
    return run_program(*command, env={"DETECTRON2_DATASETS": str(root)})


def losses(output):
    """{iteration: its losses} as the run wrote them."""
    found = {}
    for line in (output / "metrics.json").read_text().splitlines():
        entry = json.loads(line)
        found[entry["iteration"]] = {name: value for name, value in entry.items() if "loss" in name}
    return found


@pytest.mark.parametrize(
    ("processes", "mix"),
    [
        (1, "parallel"),
        pytest.param(2, "parallel", marks=pytest.mark.slow),
        pytest.param(1, "alternate", marks=pytest.mark.slow),
        pytest.param(2, "alternate", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(root, tmp_path, processes, mix):
    options = ["DATALOADER.MIX", mix]
    done = train(root, tmp_path / "straight", *options, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    # The part kills its process in the middle of step 3: the checkpoint of step 2 is the newest.
    killed = train(root, tmp_path / "parts", *options, "MODEL.CAPTION_TEST.KILL_AT", "3", processes=processes)
    assert killed.returncode == (-signal.SIGKILL if processes == 1 else 4), killed.stderr[-2000:]
    assert not (tmp_path / "parts" / "model_final.pth").is_file()
    done = train(root, tmp_path / "parts", *options, processes=processes, resume=True)
    assert done.returncode == 0, done.stderr[-3000:]
    straight, parts = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("straight", "parts")
    )
    assert straight["model"].keys() == parts["model"].keys()
    different = [name for name, value in straight["model"].items() if not torch.equal(value, parts["model"][name])]
    assert not different
    data = [found["trainer"]["data"]["sources"] for found in (straight, parts)]
    assert data[0] == data[1]
    assert [of_source["consumed"] for of_source in data[0].values()] == ([5, 5] if mix == "parallel" else [3, 2])


def test_both_sources_are_learned_from(root, tmp_path):
    done = train(root, tmp_path, "SOLVER.MAX_ITER", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    last = losses(tmp_path)[1]
    assert last["loss_caption"] > 0 and last["loss_cls"] > 0
    assert last["total_loss"] == pytest.approx(sum(v for n, v in last.items() if n != "total_loss"), rel=1e-5)


@pytest.mark.slow
def test_on_a_query_based_detector(root, tmp_path):
    done = train(root, tmp_path, "SOLVER.MAX_ITER", "2", config="ovshapes/detr_text_r18.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    last = losses(tmp_path)[1]
    assert last["loss_caption"] > 0 and last["loss_class"] > 0


def test_captions_without_a_method_that_reads_them_are_refused(root, tmp_path):
    done = train(root, tmp_path, "MODEL.PARTS", "[]")
    assert done.returncode == 2
    assert "no part of the detector has a loss for images of kind captions" in done.stderr
