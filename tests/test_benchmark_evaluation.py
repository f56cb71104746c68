"""The benchmark of the evaluation at a small size: it refuses to report a time where the figures differ."""

import os
import subprocess
import sys
from pathlib import Path

import benchmark_evaluation
import numpy as np
import pytest

from ovdet2.errors import DataError, UsageError

TOOL = Path(__file__).parents[1] / "tools" / "benchmark_evaluation.py"
SMALL = ["--images", "12", "--classes", "9", "--detections", "30"]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)
    return benchmark_evaluation


@pytest.mark.parametrize("reference", ["pycocotools", "lvis"])
def test_both_find_the_same_figures(tool, reference, capsys):
    pytest.importorskip(reference)
    result = tool.main(["--against", reference, *SMALL])
    assert result["ratio"] > 0 and f"{reference} / ovdet2" in capsys.readouterr().out


def test_one_class_and_other_figures(tool, monkeypatch):
    tool.main(["--images", "5", "--classes", "1", "--detections", "30"])
    monkeypatch.setattr(tool, "mean_of", lambda values: 50.0)
    with pytest.raises(DataError, match="AP differs: 0.5 here"):
        tool.main(SMALL)
    with pytest.raises(UsageError, match="at least 1"):
        tool.main(["--images", "0"])


def test_memory_is_measured_in_a_process_of_its_own():
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(
        [sys.executable, TOOL, "--memory", *SMALL], capture_output=True, text=True, check=True, env=environment
    )
    assert "12 images, 360 detections, 9 classes" in done.stdout and "MB above" in done.stdout
