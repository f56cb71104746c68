"""The benchmark of the evaluation at a small size: it refuses to report a time where the figures differ."""

import numpy as np
import pytest

from ovdet2.bench import evaluation
from ovdet2.errors import DataError, UsageError

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
