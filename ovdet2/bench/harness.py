"""Runs all benchmarks: a benchmark is described by data (its candidates and cases), and this module runs it.

Candidates take turns in one process (:mod:`ovdet2.bench.turns`). The first turn warms up (--warm-up). For every case and
candidate one row of a markdown table is printed: the median of the seconds, its ratio to the reference's median with the
range of the ratios within a turn, and the peak memory of two passes, above what is in use after the candidate is built,
measured in a separate process. On a shared machine, --cpu-time with --threads 1 counts processor time and not waiting time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ovdet2
from ovdet2.bench.memory import peak_above
from ovdet2.bench.turns import Clock, Elapsed, Row, naming, rows_of, take_turns
from ovdet2.errors import SetupError, UsageError, exit_on_error
from ovdet2.io.devices import require_device

Results = dict[tuple[str, ...], Row]


@dataclass(frozen=True)
class Candidate:
    """One of the implementations that are compared.

    Attributes:
        name: in the table.
        build: makes its state, once for all cases, such as a model.
        run: (state, inputs of a case) -> anything; one pass. It may return :class:`~ovdet2.bench.turns.Elapsed`.
    """

    name: str
    build: Callable[[], Any]
    run: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Case:
    """Inputs on which all candidates run.

    Attributes:
        columns: {heading: value} in the table, such as the size of the images.
        inputs: given to :attr:`Candidate.run`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    inputs: Any = None


@dataclass(frozen=True)
class Comparison:
    """Candidates and cases of one table.

    Attributes:
        candidates: in the order of the rows.
        cases: likewise.
        reference: name of the candidate whose time divides those of the others; "": the first.
        title: printed above the table.
        report: {candidate: :class:`~ovdet2.bench.turns.Elapsed` of each turn} -> None; called after the rows of a case,
            for further printing or checks.
    """

    candidates: Sequence[Candidate]
    cases: Sequence[Case] = (Case(),)
    reference: str = ""
    title: str = ""
    report: Callable[[Mapping[str, Sequence[Elapsed]]], None] | None = None


@dataclass(frozen=True)
class Benchmark:
    """A program that compares.

    Attributes:
        module: that ``python -m`` runs; the processes that measure memory are started with it.
        description: of --help.
        options: further ones, in addition to those of all benchmarks, {flag or name: arguments of add_argument}.
        plan: arguments -> comparisons, an iterator; the states of one are freed before the next is requested. The
            arguments have ``folder``, a temporary one that is shared with the processes that measure memory.
        turns, warm_up: default numbers of timed turns and of warm-up turns before them.
        memory: whether peak memory is measured.
        device: whether it may run on a GPU.
        turn_options: further names of --turns.
    """

    module: str
    description: str
    options: Mapping[str, Mapping[str, Any]]
    plan: Callable[[argparse.Namespace], Iterator[Comparison]]
    turns: int = 5
    warm_up: int = 1
    memory: bool = True
    device: bool = True
    turn_options: tuple[str, ...] = ()

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The command line.

        Raises:
            UsageError: a value out of range or of another form.
        """
        form = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=self.description, formatter_class=form, exit_on_error=False)
        turns = f"timed turns (default: {self.turns}; 0: measure memory only)"
        parser.add_argument("--turns", *self.turn_options, dest="turns", type=int, default=self.turns, help=turns)
        parser.add_argument("--warm-up", type=int, default=self.warm_up, help="turns before them that are not timed")
        parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
        parser.add_argument("--cpu-time", action="store_true", help="processor time of the process, not the clock")
        parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
        parser.set_defaults(device="cpu", no_memory=True, peak=None)
        if self.device:
            parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        if self.memory:
            parser.add_argument("--no-memory", action="store_true", default=False, help="measure times only")
            parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)  # of the processes that measure memory
        for name, arguments in self.options.items():
            parser.add_argument(name, **arguments)
        try:
            args = parser.parse_args(argv)
        except argparse.ArgumentError as error:
            raise UsageError(f"{error}.") from None
        require_device(args.device, "--device")
        if args.warm_up < 0:
            raise UsageError(f"--warm-up is {args.warm_up}: it is a number of turns and must be at least 0.")
        if args.turns < 0 or (args.turns == 0 and args.no_memory):
            raise UsageError(f"--turns {args.turns} measures nothing: it must be at least 1.")
        return args

    def main(self, argv: Sequence[Any] | None = None) -> Results:
        """Run, and print the tables.

        Args:
            argv: command line; None: that of the process; an error then sets its exit code.

        Returns:
            {(value of each column of the case ..., candidate): :class:`~ovdet2.bench.turns.Row`}.

        Raises:
            UsageError: wrong options.
            SetupError: memory cannot be measured.
        """
        if argv is None:
            with exit_on_error():
                return self.main(sys.argv[1:])
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory(prefix="ovdet2-") as folder:
            argv = ["--folder", folder, *map(str, argv)]  # the last one given counts
            args = self.parse(argv)
            torch.set_num_threads(args.threads)
            try:
                with contextlib.closing(self._comparisons(args)) as plan:
                    if args.peak:
                        print(json.dumps(_peak_here(plan, args)))
                        return {}
                    results: Results = {}
                    for number, comparison in enumerate(plan):
                        results |= self._compare(comparison, args, partial(_peak_elsewhere, self.module, argv, number))
                    return results
            finally:
                torch.set_num_threads(threads)

    def _comparisons(self, args: argparse.Namespace) -> Generator[Comparison, None, None]:
        """The plan as a generator, which can be closed early."""
        yield from self.plan(args)

    def _compare(self, comparison: Comparison, args: argparse.Namespace, peak: Callable[[int, str], float]) -> Results:
        names = [candidate.name for candidate in comparison.candidates]
        reference = comparison.reference or names[0]
        states, clock = {}, Clock(args.device, args.cpu_time)
        for candidate in comparison.candidates if args.turns else ():
            with naming(candidate.name):
                states[candidate.name] = candidate.build()
        _print_head(comparison, reference, args)
        results: Results = {}
        for place, case in enumerate(comparison.cases):
            rows, times = dict.fromkeys(names, Row()), {}
            if args.turns:
                passes = {c.name: partial(c.run, states[c.name], case.inputs) for c in comparison.candidates}
                times = take_turns(passes, args.turns, clock, args.warm_up, ", ".join(case.columns.values()))
                rows = rows_of(times, reference)
            for name, row in rows.items():
                if not args.no_memory:
                    row = replace(row, peak=peak(place, name))
                results[(*case.columns.values(), name)] = row
                print(row_text(list(case.columns.values()), name, row), flush=True)
            if comparison.report is not None and times:
                comparison.report(times)
        return results


def positive(text: str) -> int:
    """A whole number of at least 1; a type of options."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def size_of(text: str) -> tuple[int, int]:
    """(height, width) of "HxW"; a type of options."""
    sides = text.split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give height x width in pixels, such as 800x1066")
    return positive(sides[0]), positive(sides[1])


def size_text(size: tuple[int, int]) -> str:
    """What :func:`size_of` reads."""
    return f"{size[0]}x{size[1]}"


SIZE = {"type": size_of, "help": "height x width of the images, in pixels"}


def table_head(columns: Sequence[str]) -> str:
    """The first two lines of a table whose rows are those of :func:`row_text`."""
    headings = [*columns, "candidate", "median, s", "ratio (range)", "peak, MiB"]
    return f"| {' | '.join(headings)} |\n|{'---|' * (len(headings) - 3)}---:|---:|---:|"


def row_text(columns: Sequence[str], name: str, row: Row) -> str:
    """A line of the table; what was not measured is "-"."""
    seconds = ratio = peak = "-"
    if row.seconds is not None:
        seconds = f"{row.seconds:.3f}" if row.seconds >= 0.1 else f"{row.seconds:.3g}"
        ratio = "1" if row.low == row.high == 1 else f"{row.ratio:.3f} ({row.low:.3f} to {row.high:.3f})"
    if row.peak is not None:
        peak = f"{row.peak:.0f}"
    return f"| {' | '.join([*columns, name, seconds, ratio, peak])} |"


def _print_head(comparison: Comparison, reference: str, args: argparse.Namespace) -> None:
    clock = "processor time" if args.cpu_time else "wall clock"
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    facts = [comparison.title, args.device, threads, clock, f"timed turns: {args.turns}", f"ratios to {reference}"]
    print(", ".join(fact for fact in facts if fact))
    print(table_head(list(comparison.cases[0].columns)), flush=True)


def _peak_here(plan: Iterator[Comparison], args: argparse.Namespace) -> float:
    """MiB of two passes, the second has the state that the first creates, such as an optimizer's state."""
    number, place, name = args.peak
    comparison = next(itertools.islice(plan, int(number), None))
    (candidate,) = (candidate for candidate in comparison.candidates if candidate.name == name)
    state, inputs = candidate.build(), comparison.cases[int(place)].inputs
    return peak_above(lambda: [candidate.run(state, inputs) for _ in range(2)], args.device)


def _peak_elsewhere(module: str, argv: Sequence[str], number: int, place: int, name: str) -> float:
    """:func:`_peak_here` in a process that holds only this candidate.

    Raises:
        SetupError: the process failed; the message quotes the end of its stderr.
    """
    package = str(Path(ovdet2.__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", module, "--peak", str(number), str(place), name, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    if done.returncode:
        raise SetupError(
            f"the process that measures the memory of the candidate {name!r} ended with code {done.returncode} (give "
            f"--no-memory to skip this). It wrote:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
