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


def straight_and_resumed(root, folder, options, processes, config="ovshapes/vild_text_r18.yaml"):
    """The last checkpoints of a run of 5 steps, and of one that is killed in step 3 and resumed; their weights are equal."""
    done = train(root, folder / "straight", *options, processes=processes, config=config)
    assert done.returncode == 0, done.stderr[-3000:]
    # The part kills its process in the middle of step 3: the checkpoint of step 2 is the newest.
    killed = train(
        root, folder / "parts", *options, "MODEL.CAPTION_TEST.KILL_AT", "3", processes=processes, config=config
    )
    assert killed.returncode == (-signal.SIGKILL if processes == 1 else 4), killed.stderr[-2000:]
    assert not (folder / "parts" / "model_final.pth").is_file()
    done = train(root, folder / "parts", *options, processes=processes, config=config, resume=True)
    assert done.returncode == 0, done.stderr[-3000:]
    straight, parts = (
        torch.load(folder / name / "model_final.pth", weights_only=True) for name in ("straight", "parts")
    )
    assert straight["model"].keys() == parts["model"].keys()
    different = [name for name, value in straight["model"].items() if not torch.equal(value, parts["model"][name])]
    assert not different
    return straight, parts


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
    straight, parts = straight_and_resumed(root, tmp_path, options, processes)
    data = [found["trainer"]["data"]["sources"] for found in (straight, parts)]
    assert data[0] == data[1]
    assert [of_source["consumed"] for of_source in data[0].values()] == ([5, 5] if mix == "parallel" else [3, 2])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_queue_of_captions_resumes_bit_for_bit(root, tmp_path, processes):
    cache = tmp_path / "captions.safetensors"
    teacher = ["--architecture", "ovshapes-resnet", "--pretrained", "embedded"]
    command = ["ovdet2/programs/build_caption_cache.py", "--dataset", "ov_shapes_captions", *teacher, "--output", cache]
    done = run_program(*command, env={"DETECTRON2_DATASETS": str(root)})
    assert done.returncode == 0, done.stderr[-2000:]
    options = ["DATASETS.CAPTION_CACHE", cache, "MODEL.DETIC.QUEUE", "7"]
    straight, parts = straight_and_resumed(root, tmp_path, options, processes, "ovshapes/detic_both_r18.yaml")
    queue = "detic.terms.loss_captions.queue"
    assert straight["model"][f"{queue}.place"] == 5 * 2 % 7  # two captions of each step, of all processes
    assert torch.equal(straight["model"][f"{queue}.ids"], parts["model"][f"{queue}.ids"])
    assert torch.isfinite(straight["model"][f"{queue}.embeddings"]).all()


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
