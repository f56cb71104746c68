"""tools/torch_versions.py: the versions it asks for, and how a failure of each command ends. Nothing is installed."""

import re
from pathlib import Path

import pytest
import torch_versions as tool

ROOT = Path(__file__).resolve().parents[1]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


def pinned(package):
    """The tested version of constraints.txt."""
    return re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[1]


def numbers(version):
    return [int(part) for part in version.split(".")[:2]]


def test_oldest_and_newest_are_the_bounds_of_setup_py():
    for package, oldest, newest in zip(
        tool.PAIR, tool.requirements(SETUP, "oldest"), tool.requirements(SETUP, "newest")
    ):
        low, high = re.fullmatch(rf"{package}>=([\d.]+),<([\d.]+)", newest).groups()
        assert f'"{newest}"' in SETUP and oldest == f"{package}=={low}"
        assert numbers(low) < numbers(pinned(package)) < numbers(high)
    with pytest.raises(ValueError, match='no "torchvision>=LOW,<HIGH"'):
        tool.requirements(SETUP.replace('"torchvision>=', '"torchvision=='), "oldest")


@pytest.mark.parametrize(
    "versions, requirement, same",
    [
        ("2.6.0+cu124 0.21.0", "torch==2.6", True),
        ("2.6.0 0.21.0", "torch==2.6.0", True),
        ("2.60.0 0.75.0", "torch==2.6", False),
        ("2.6.1 0.21.1", "torch==2.6", False),
        ("2.15.0 0.29.2", "torch>=2.6,<2.16", True),
    ],
)
def test_a_replaced_version_is_noticed(versions, requirement, same):
    assert tool.has_version(versions, requirement) == same


def test_the_default_tests_exist():
    assert all((ROOT / path).is_file() for path in tool.DEFAULT_TESTS)


def ended(end, fails, versions="2.6.0+cu124 0.21.0+cu124"):
    """(commands that ran, result) of an environment in which the commands with the word ``fails`` fail."""
    commands = []

    def run(command):
        commands.append(" ".join(command))
        return int(fails in command)

    return commands, tool.run_end(end, Path("env"), ["tests/test_layers.py"], run, lambda folder: versions)


def test_each_command_runs_once_and_in_order():
    commands, result = ended("oldest", "nothing")
    kinds = [
        "-m venv env",
        "install --quiet torch==2.6 torchvision==0.21",
        "make install VENV=env",
        "ovdet2 doctor",
        "pytest",
    ]
    assert len(commands) == 5 and all(kind in command for kind, command in zip(kinds, commands))
    assert commands[-1].endswith("tests/test_layers.py") and "not slow" in commands[-1]
    assert result == ("2.6.0+cu124 0.21.0+cu124", "passed", 0)
    assert "--upgrade torch>=" in ended("newest", "nothing")[0][1]


@pytest.mark.parametrize(
    "fails, ran, outcome, code",
    [
        ("venv", 1, "not made: .* -m venv env", 4),
        ("torch==2.6", 2, "not made: .* torch==2.6 torchvision==0.21", 4),
        ("make", 3, "not made: make install VENV=env", 4),
        ("doctor", 5, "failed: ovdet2", 1),
        ("pytest", 5, "failed: pytest", 1),
    ],
)
def test_a_failure_ends_with_its_command(fails, ran, outcome, code):
    commands, (_, found, given) = ended("oldest", fails)
    assert len(commands) == ran and re.fullmatch(outcome, found) and given == code


def test_another_version_than_asked_is_not_tested():
    commands, (versions, outcome, code) = ended("oldest", "nothing", "2.15.0 0.29.2")
    assert (versions, outcome, code) == ("2.15.0 0.29.2", "another package replaced torch==2.6", 4)
    assert not any("pytest" in command for command in commands)


def test_the_exit_code_is_the_worst_and_the_table_names_both(monkeypatch, tmp_path, capsys):
    results = {"oldest": ("2.6.0 0.21.0", "failed: pytest", 1), "newest": ("2.15.0 0.29.2", "passed", 0)}
    monkeypatch.setattr(tool, "run_end", lambda end, folder, *_: results[end] if folder == tmp_path / end else None)
    assert tool.main(["--environments", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"oldest +2\.6\.0 0\.21\.0 +failed: pytest\nnewest +2\.15\.0 0\.29\.2 +passed", printed)
    assert tool.main(["--environments", str(tmp_path), "--only", "newest"]) == 0
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--only", "middle"])
