"""The benchmark of the evaluation at a small size: it refuses to report a time where the figures differ."""

import argparse

import numpy as np
import pytest

from ovdet2.bench import evaluation
from ovdet2.bench.evaluation_set import write_set
from ovdet2.errors import DataError, UsageError
from ovdet2.evaluation import coco_ap
from ovdet2.evaluation.evaluation import measure
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.evaluation.predictions import read_predictions

SMALL = ["--images", "12", "--classes", "9", "--detections", "30"]
CASE = ("12", "360", "9")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)
    return evaluation


@pytest.mark.parametrize("reference", ["pycocotools", "lvis"])
def test_both_find_the_same_figures(tool, reference, capsys):
    pytest.importorskip(reference)
    result = tool.main(["--against", reference, *SMALL])
    assert result[*CASE, reference].ratio > 0 and result[*CASE, "ovdet2"].ratio == 1
    assert f"{reference}: AP 0." in capsys.readouterr().out


def test_one_class_and_other_figures(tool, monkeypatch):
    tool.main(["--images", "5", "--classes", "1", "--detections", "30"])
    monkeypatch.setattr(tool, "mean_of", lambda values: 50.0)
    with pytest.raises(DataError, match="AP differs: 0.5 here"):
        tool.main(SMALL)
    with pytest.raises(UsageError, match="at least 1"):
        tool.main(["--images", "0"])


def test_memory_is_measured_of_ovdet2_only(tool):
    ((key, row),) = tool.main(["--memory", *SMALL]).items()
    assert key == (*CASE, "ovdet2") and row.peak > 0 and row.seconds is None


def test_ranges_of_areas_one_by_one_give_the_same_figures(tool, monkeypatch, tmp_path):
    args = argparse.Namespace(images=40, classes=3, detections=30, seed=0, skew=1.0)
    write_set(tmp_path, "ov_coco", args)
    truth, split = evaluation._truth_of(tmp_path, "ov_coco")
    detections = read_predictions(tmp_path / MERGED).detections
    assert len(detections) == 1200
    together = measure(truth, detections, split, "ov_coco", 30)
    monkeypatch.setattr(coco_ap, "_MANY", 0)
    np.testing.assert_equal(measure(truth, detections, split, "ov_coco", 30), together)


@pytest.mark.slow
def test_memory_of_six_million_detections(tool):
    ((_, row),) = tool.main(["--memory", "--images", "20000", "--classes", "65", "--detections", "300"]).items()
    assert row.peak < 2000  # MiB besides the ground truth and the libraries, which take some 500
