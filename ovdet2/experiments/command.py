"""Programs run in their own process, from the installed package or from a checkout."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import ovdet2
from ovdet2.command_line import add_run_arguments
from ovdet2.errors import UsageError

# The folder of configs/, projects/ and demo/ in a checkout.
CHECKOUT = Path(ovdet2.__file__).resolve().parents[1]


def checkout_file(name: str) -> Path:
    """The path of a file of a checkout, such as "projects/CLIM/train.py".

    Raises:
        UsageError: it does not exist, as in an installed package.
    """
    path = CHECKOUT / name
    if not path.is_file():
        raise UsageError(
            f"{name} is needed, which an installed ovdet2 does not have: get a checkout of the repository, install it "
            "with pip install --editable, and run the same command."
        )
    return path


def fill(command: Sequence[str], values: Mapping[str, object]) -> list[str]:
    """The words of a command with "{name}" replaced by the value of that name."""
    words = list(command)
    for name, value in values.items():
        words = [word.replace(f"{{{name}}}", str(value)) for word in words]
    return words


def overrides_in(passed_on: Sequence[str]) -> list[str]:
    """The KEY VALUE ... in further arguments of the training program, such as "--num-gpus 8 SOLVER.MAX_ITER 9"."""
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return parser.parse_args(list(passed_on)).opts


def run_program(command: Sequence[str]) -> None:
    """Run a program and wait for it.

    Args:
        command: an importable module, or a script of a checkout (it ends in ".py"), and its arguments.

    Raises:
        UsageError: see :func:`checkout_file`.
        SystemExit: it failed; with its exit code.
    """
    program, *arguments = command
    is_script = program.endswith(".py")
    start = [str(checkout_file(program))] if is_script else ["-m", program]
    print(f"$ python {program if is_script else f'-m {program}'} {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, *start, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)
