"""F-VLM through the programs a user types, on a small OV-Shapes: training, the row without fusion, another teacher."""

import pytest
import torch

from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.io.files import read_json, write_json
from ovdet2.modeling import build_teacher
from tests.test_end_to_end import SMALL, program, report_of

pytestmark = pytest.mark.slow
CONFIG = "configs/ovshapes/fvlm_resnet.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of data sets, output folder) of a training of three steps, evaluated with fusion."""
    root, output = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("output")
    ensure_generated(root, counts={"train2017": 16, "val2017": 6}, workers=1)
    done = program("train_net.py", "--config-file", CONFIG, *SMALL, "OUTPUT_DIR", output, root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, output


def evaluate(root, weights, output, config, *overrides):
    options = ["OUTPUT_DIR", output, "MODEL.WEIGHTS", weights, *overrides]
    return program("train_net.py", "--config-file", config, "--eval-only", *SMALL, *options, root=root)


def test_checkpoint_holds_clip_as_it_came(run):
    """After training, trunk and attention pool are bit for bit the teacher's; what was trained is finite."""
    weights = torch.load(run[1] / "model_final.pth", weights_only=True)["model"]
    visual = build_teacher(load_config(CONFIG)).clip.visual
    for name, tensor in visual.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(weights[f"backbone.trunk.visual.{name}"], tensor), name
    assert all(torch.isfinite(value).all() for value in weights.values() if value.is_floating_point())


def test_the_row_without_fusion_evaluates_the_same_weights(run, tmp_path):
    root, output = run
    done = evaluate(root, output / "model_final.pth", tmp_path, "configs/ovshapes/fvlm_resnet_detector.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert report_of(tmp_path)["images"] == report_of(output)["images"] == 6
    assert "AR@100-novel" in report_of(output)["proposals"]


def test_a_data_set_of_other_words(run, tmp_path):
    """Transfer: another list of words in another order, of which one was a base class in training; nothing else."""
    root, output = run
    data = read_json(root / "ov_shapes" / "annotations" / "ov_shapes_val_all.json")
    ids = {category["name"]: category["id"] for category in data["categories"]}
    split = split_of("ov_shapes_train_base")
    old = next(name for name, base in zip(split.names, split.base_mask) if base)
    new = {ids[old]: old} | {category_id: f"{name} sign" for name, category_id in ids.items() if name != old}
    new = dict(sorted(new.items(), key=lambda entry: entry[1])[::7]) | {ids[old]: old}
    data["categories"] = [{"id": category_id, "name": name} for category_id, name in new.items()]
    data["annotations"] = [box for box in data["annotations"] if box["category_id"] in new]
    write_json(tmp_path / "signs.json", data)
    own = {"name": "signs", "json": str(tmp_path / "signs.json"), "images": "ov_shapes/val2017", "base": [old]}
    own["novel"] = [name for name in new.values() if name != old]
    overrides = ["DATASETS.OWN", [own], "DATASETS.TEST", "('signs',)", "TEST.EXPECTED_RESULTS", []]
    done = evaluate(root, output / "model_final.pth", tmp_path / "output", CONFIG, *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    report = read_json(tmp_path / "output" / "inference" / "signs" / "report.json")
    assert report["classes"]["base"]["classes"] == 1 and report["classes"]["novel"]["classes"] == len(new) - 1


def test_weights_of_another_teacher_are_refused(run, tmp_path):
    root, output = run
    options = ["MODEL.TEACHER.ARCHITECTURE", "ovshapes-vit"]
    done = evaluate(root, output / "model_final.pth", tmp_path, CONFIG, *options)
    assert done.returncode == 3 and "ovshapes-resnet" in done.stderr and "ovshapes-vit" in done.stderr
