"""Run tests with the oldest and with the newest torch that setup.py allows, each in its own environment.

    python tools/torch_versions.py                      # the tests of DEFAULT_TESTS
    python tools/torch_versions.py --only oldest tests/test_layers.py tests/test_engine.py
    make versions TESTS="tests/test_layers.py"               # the same as a target of make

An environment (6 GB) is made below --environments with a torch and torchvision of one release, the rest as `make install`
has it, and kept. In each: `ovdet2 doctor`, then pytest without the slow tests, in one process. The versions that ran, and
how it ended, are printed as a table.

Exit codes: 1 a check or a test failed, 2 usage, 4 an environment could not be made.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIR = ("torch", "torchvision")
ENDS = ("oldest", "newest")
# What depends most on torch: attention, losses, matching, weights of all forms, optimizers, processes, resuming, detectors.
DEFAULT_TESTS = (
    "tests/test_layers.py",
    "tests/test_ms_deform_attn.py",
    "tests/test_detr_criterion.py",
    "tests/test_detr_build.py",
    "tests/test_rcnn.py",
    "tests/test_checkpoint.py",
    "tests/test_weight_files.py",
    "tests/test_solver.py",
    "tests/test_engine.py",
    "tests/test_launch.py",
)
_VERSIONS = "import torch, torchvision; print(torch.__version__, torchvision.__version__)"


def requirements(setup_text: str, end: str) -> list[str]:
    """What pip is given for torch and torchvision.

    Args:
        setup_text: content of setup.py, with "torch>=LOW,<HIGH" and the same for torchvision.
        end: "oldest", the two lower bounds; or "newest", the highest versions within the bounds.

    Raises:
        ValueError: a package has no such bounds.
    """
    found = []
    for package in PAIR:
        bounds = re.search(rf'"{package}>=([\d.]+),<([\d.]+)"', setup_text)
        if bounds is None:
            raise ValueError(f'setup.py has no "{package}>=LOW,<HIGH": state both bounds.')
        low, high = bounds.groups()
        found.append(f"{package}=={low}" if end == "oldest" else f"{package}>={low},<{high}")
    return found


def commands(end: str, folder: Path, setup_text: str, tests: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
    """(commands that make the environment, commands that check it), each with its arguments, for the folder ROOT."""
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    make = [
        [sys.executable, "-m", "venv", str(folder)],
        # Before the rest, which is then chosen to go with this pair.
        [*pip, *(["--upgrade"] if end == "newest" else []), *requirements(setup_text, end)],
        ["make", "install", f"VENV={folder}"],
    ]
    check = [
        [python, "-m", "ovdet2", "doctor"],
        [python, "-m", "pytest", "-m", "not slow", "-q", "-p", "no:warnings", "-p", "no:cacheprovider", *tests],
    ]
    return make, check


def installed(folder: Path) -> str:
    """The versions of torch and torchvision of an environment."""
    python = folder / "bin" / "python"
    return subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout.strip()


def has_version(versions: str, requirement: str) -> bool:
    """Whether the first of the versions, such as "2.6.0+cu124 0.21.0", is that of "torch==2.6"; of a range, always."""
    _, exact, version = requirement.partition("==")
    return not exact or re.match(rf"{re.escape(version)}(\.0)*(\+|$)", versions.split()[0]) is not None


def run_end(
    end: str, folder: Path, tests: Sequence[str], run: Callable[[list[str]], int], versions: Callable[[Path], str]
) -> tuple[str, str, int]:
    """Make and check one environment.

    Args:
        end: "oldest" or "newest".
        folder: of the environment.
        tests: arguments of pytest.
        run: gives the exit code of a command.
        versions: :func:`installed`.

    Returns:
        The versions of torch and torchvision, how it ended, and the exit code: 0, 1 or 4.
    """
    setup_text = (ROOT / "setup.py").read_text(encoding="utf-8")
    make, check = commands(end, folder, setup_text, tests)
    for command in make:
        if run(command):
            return "", f"not made: {' '.join(command)}", 4
    found, [requirement, _] = versions(folder), requirements(setup_text, end)
    if not has_version(found, requirement):
        return found, f"another package replaced {requirement}", 4
    failed = [command[2] for command in check if run(command)]
    return found, f"failed: {', '.join(failed)}" if failed else "passed", bool(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=DEFAULT_TESTS, help="files or names of tests, as of pytest")
    parser.add_argument("--only", choices=ENDS, help="one of the two environments")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-torch", help="folder of the environments")
    args = parser.parse_args(argv)
    # The checkout that is tested, whatever else of ovdet2 is installed; one thread per process, as in `make test`.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(command):
        print("+", " ".join(command), flush=True)
        return subprocess.run(command, cwd=ROOT, env=environment).returncode

    rows = []
    for end in [args.only] if args.only else ENDS:
        rows.append((end, *run_end(end, args.environments.resolve() / end, args.tests, run, installed)))
    for end, versions, outcome, _ in rows:
        print(f"{end:8}  {versions or '-':28}  {outcome}")
    return max(code for *_, code in rows)


if __name__ == "__main__":
    sys.exit(main())
