"""The benchmark that compares the training steps of two checkouts: here of this one with itself."""

from pathlib import Path

import pytest

from ovdet2.bench import train_step
from ovdet2.errors import SetupError, UsageError

HERE = str(Path(train_step.__file__).parents[2])
OPTIONS = ["--before", HERE, "--config-file", "configs/ovshapes/vild_text_r18.yaml", "--device", "cpu", "--turns", "2"]


@pytest.mark.slow
def test_equal_checkouts_have_equal_losses(capsys):
    found = train_step.main([*OPTIONS, "SOLVER.IMS_PER_BATCH", "1"])
    assert [key[-1] for key in found] == ["before", "after"] and all(row.seconds > 0 for row in found.values())
    assert "losses of all 2 timed steps are equal" in capsys.readouterr().out


def test_a_process_that_fails_is_quoted(tmp_path):
    with pytest.raises(SetupError, match="(?s)candidate 'before': training in .* ended with code 1.*NO_SUCH_KEY"):
        train_step.main([*OPTIONS, "NO_SUCH_KEY", "1"])
    with pytest.raises(UsageError, match="give the folder of a checkout"):
        train_step.main([*OPTIONS[2:], "--before", str(tmp_path)])
