"""The OV-LVIS path, a transfer target and distractor words through the programs a user types, on a small OV-Shapes."""

import json
import shutil

import pytest

import train_net
from ovdet2 import Detector
from ovdet2.config import load_config
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.data.datasets.splits import OV_COCO_UNUSED
from ovdet2.engine import AtomicCheckpointer, Trainer
from tests.test_end_to_end import SMALL, WITHOUT_PICTURES, program

CONFIG = "configs/ovshapes/federated_lvis_r18.yaml"
ONE_STAGE_MASKS = ["MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of data sets, output folder) of three steps on OV-Shapes in LVIS's form."""
    root, output = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("output")
    ensure_generated(root, counts={"train2017": 16, "val2017": 6}, workers=1)
    options = [*SMALL, *ONE_STAGE_MASKS, *WITHOUT_PICTURES, "OUTPUT_DIR", output]
    done = program("train_net.py", "--config-file", CONFIG, *options, root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, output


def report_of(output, dataset="ov_shapes_lvis_val"):
    return json.loads((output / "inference" / dataset / "report.json").read_text())


def evaluate(root, weights, output, *options):
    done = program(
        "train_net.py", "--config-file", CONFIG, "--eval-only", *SMALL, *ONE_STAGE_MASKS,
        *WITHOUT_PICTURES, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", output, *options, root=root,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_masks_are_trained_and_evaluated_by_the_rules_of_lvis(run):
    _, output = run
    report = report_of(output)
    for task in ("bbox", "segm"):
        assert {"AP-all", "APr", "APc", "APf", "AP50-novel", "AP-base"} <= set(report[task])
        assert report[task]["APr"] == report[task]["AP-novel"]
    assert report["metric"].startswith("LVIS") and report["detections_per_image"] == 300
    steps = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert all(step["loss_mask"] > 0 and step["loss_cls"] > 0 for step in steps if "loss_mask" in step)
    assert any("loss_mask" in step for step in steps)
    assert report["vocabulary"]["words"] == 65 and report["vocabulary"]["teacher"]["architecture"] == "ovshapes-resnet"


def test_two_processes_give_the_same_files(run, tmp_path, monkeypatch):
    root, output = run
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    paths = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path)]
    train_net.run(["--config-file", CONFIG, "--eval-only", "--num-gpus", "2", *SMALL, *ONE_STAGE_MASKS, *paths])
    folder = "inference/ov_shapes_lvis_val"
    assert (tmp_path / folder / "predictions.jsonl").read_bytes() == (
        output / folder / "predictions.jsonl"
    ).read_bytes()
    ours, theirs = report_of(tmp_path), report_of(output)
    assert ours.pop("weights") == str(output / "model_final.pth")
    assert theirs.pop("weights") == f"of the run in {output}, after 3 iterations"
    for key in ("processes", "seconds", "finished", "command"):
        del ours[key], theirs[key]
    assert ours == theirs
    assert "data:image" in (tmp_path / folder / "report.html").read_text()


def test_two_data_sets_of_different_words_are_refused(run, tmp_path):
    root, output = run
    done = program(
        "train_net.py", "--config-file", CONFIG, "--eval-only", *SMALL, *ONE_STAGE_MASKS, "OUTPUT_DIR", tmp_path,
        "MODEL.WEIGHTS", output / "model_final.pth", "DATASETS.TEST", "('ov_shapes_lvis_val', 'ov_shapes_val_all')",
        root=root,
    )  # fmt: skip
    assert done.returncode == 2 and "one data set at a time" in done.stderr


def test_distractor_words_are_named_and_leave_the_figures_to_the_data_set(run, tmp_path):
    root, output = run
    printed = evaluate(root, output / "model_final.pth", tmp_path, "TEST.DISTRACTORS", "['coco_unused', 'zebra']")
    report = report_of(tmp_path)
    assert report["distractors"] == [name for _, name in OV_COCO_UNUSED] + ["zebra"]
    assert report["distractor_detections"] > 0 and "16 distractor words" in printed
    assert report["detections"] + report["distractor_detections"] <= 6 * 300
    assert report["classes"]["all"]["classes"] == 65


def test_the_predictor_needs_no_data_set(run, tmp_path, monkeypatch):
    root, output = run
    image = next((root / "ov_shapes" / "val2017").glob("*.jpg"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))  # the split of an LVIS data set is in its json
    predictor = Detector(CONFIG, output / "model_final.pth", [*SMALL, *ONE_STAGE_MASKS])
    assert len(predictor.names) == 65 and predictor.names[0].count("_") == 1
    found = predictor.predict(str(image))
    assert found.has("pred_masks") and len(found)
    predictor.set_vocabulary("red star, blue moon")
    assert predictor.predict(str(image)).pred_classes.max() <= 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def target(run, tmp_path):
    """A transfer target of two classes, one of which the detector was trained on, in place of COCO."""
    root = tmp_path / "datasets"
    shutil.copytree(run[0] / "ov_shapes" / "val2017", root / "coco" / "val2017")
    truth = json.loads((run[0] / "ov_shapes" / "annotations" / "instances_val2017.json").read_text())
    some = truth["annotations"][0]["category_id"]
    data = {
        "images": truth["images"],
        "annotations": [{**a, "category_id": 1 + (a["category_id"] != some)} for a in truth["annotations"]],
        "categories": [{"id": 1, "name": "plain circle"}, {"id": 2, "name": "anything else"}],
    }
    (root / "coco" / "annotations").mkdir()
    (root / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    return root


def test_a_transfer_target_changes_the_vocabulary_alone(run, target, tmp_path, monkeypatch):
    weights = run[1] / "model_final.pth"
    options = ["DATASETS.TEST", "('transfer_coco_2017_val',)", "MODEL.MASK_ON", "False"]
    evaluate(target, weights, tmp_path / "out", *options)
    report = report_of(tmp_path / "out", "transfer_coco_2017_val")
    assert set(report["classes"]) == {"novel", "all"} and report["classes"]["all"]["classes"] == 2
    assert "base" not in json.dumps(list(report["bbox"]))
    # The word of training counts as base where scores are fused.
    monkeypatch.setenv("DETECTRON2_DATASETS", str(target))
    cfg = load_config(CONFIG, [*SMALL, *ONE_STAGE_MASKS, *options, "MODEL.DEVICE", "cpu"])
    model = Trainer.build_model(cfg)
    assert model.vocabulary.base_mask.tolist() == [False, False]
    AtomicCheckpointer(model, tmp_path).resume_or_load(str(weights), resume=False)
    assert model.vocabulary.base_mask.tolist() == [True, False]
    assert model.vocabulary.words.base_mask.tolist() == [True, False]
