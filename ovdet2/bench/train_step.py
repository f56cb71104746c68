r"""A training step of this checkout of ovdet2 against that of another checkout: is it slower than before?

    ovdet2 bench train-step --before ../ovdet2-before --config-file ovshapes/vild_text_r18.yaml

Each checkout trains in a separate process with its own files on PYTHONPATH and in its folder, so that it reads its own
configuration; relative paths in overrides are relative to it. The processes take turns: one waits while the other does
a step. A step includes the loading of its batch as far as DATALOADER.NUM_WORKERS is 0; nothing is saved or evaluated.
The total losses are compared, too: equal ones show that both do the same work.
"""

import argparse
import contextlib
import importlib.resources
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ovdet2
from ovdet2.bench.harness import Benchmark, Candidate, Case, Comparison
from ovdet2.bench.turns import Elapsed
from ovdet2.command_line import CONFIG_FILE, OVERRIDES
from ovdet2.errors import SetupError, UsageError

_WORKER = importlib.resources.files("ovdet2.bench") / "train_step_worker.py"
_HERE = Path(ovdet2.__file__).resolve().parents[1]
OPTIONS = {
    "--before": {"type": Path, "required": True, "help": "folder of the other checkout, the reference"},
    "--after": {"type": Path, "default": _HERE, "help": "folder of the checkout measured (default: this one)"},
    "--config-file": CONFIG_FILE | {"required": True},
    "opts": OVERRIDES,
}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """One configuration, two checkouts."""
    for folder in (args.before, args.after):
        if not (folder / "ovdet2" / "__init__.py").is_file():
            raise UsageError(f"{folder} has no ovdet2/__init__.py: give the folder of a checkout.")
    with contextlib.ExitStack() as stack:

        def start(name):
            return stack.enter_context(Worker(getattr(args, name).resolve(), args))

        candidates = [Candidate(name, lambda name=name: start(name), Worker.step) for name in ("before", "after")]
        yield Comparison(candidates, [Case({"configuration": args.config_file})], report=compare_losses)


def compare_losses(times: Mapping[str, Sequence[Elapsed]]) -> None:
    """Print whether the losses of all steps are equal in both."""
    before, after = ([elapsed.value for elapsed in times[name]] for name in ("before", "after"))
    different = [step for step, pair in enumerate(zip(before, after)) if pair[0] != pair[1]]
    if different:
        first = different[0]
        print(f"the losses differ from timed step {first} on: {before[first]!r} before, {after[first]!r} after")
    else:
        print(f"the losses of all {len(before)} timed steps are equal, the last is {before[-1]!r}")


class Worker:
    """A process that trains, step by step, with the ovdet2 of a checkout; the exit of the context ends it."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.clock = folder, "process_time" if args.cpu_time else "perf_counter"
        self._output = tempfile.TemporaryDirectory(prefix="ovdet2-")
        self._log = open(Path(self._output.name) / "log", "w+")
        environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        if "DETECTRON2_DATASETS" in environment:
            environment["DETECTRON2_DATASETS"] = os.path.abspath(environment["DETECTRON2_DATASETS"])
        # Without -P, python would find modules of ovdet2.bench by their bare names.
        command = [sys.executable, "-P", str(_WORKER), args.config_file, str(args.threads), self.clock, *args.opts]
        command += ["MODEL.DEVICE", args.device, "OUTPUT_DIR", self._output.name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)

    def __enter__(self) -> "Worker":
        package = Path(self._ask()["package"]).resolve()
        if package != self.folder / "ovdet2":
            raise SetupError(
                f"the process for {self.folder} imported {package}: is another ovdet2 put before PYTHONPATH?"
            )
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._output.cleanup()

    def step(self, _inputs: Any) -> Elapsed:
        """Run one step."""
        answer = self._ask("step")
        return Elapsed(answer["seconds"], answer["loss"])

    def _ask(self, request=""):
        with contextlib.suppress(BrokenPipeError):  # it has ended: the line below is empty
            if request:
                print(request, file=self._process.stdin, flush=True)
        assert self._process.stdout is not None  # a pipe
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._log.seek(0)
        raise SetupError(f"training in {self.folder} ended with code {code}. It wrote:\n{self._log.read()[-2000:]}")


main = Benchmark("ovdet2.bench.train_step", __doc__, OPTIONS, plan, turns=20, warm_up=3, memory=False).main

if __name__ == "__main__":
    main()
