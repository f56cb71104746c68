"""Paired turns: candidates run in turn, many times, so that other load on the machine slows all of them equally."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ovdet2.errors import OVDetError


class Clock:
    """Seconds of the wall clock or of this process' processors, read once the device has finished its work."""

    def __init__(self, device: str = "cpu", cpu_time: bool = False) -> None:
        self.on_cuda = device.startswith("cuda")
        self.read = time.process_time if cpu_time else time.perf_counter

    def __call__(self) -> float:
        if self.on_cuda:
            torch.cuda.synchronize()
        return self.read()


@dataclass(frozen=True)
class Elapsed:
    """Seconds of a pass and what it returned. A pass that measures its own time, as it prepares something first or runs
    in another process, returns one."""

    seconds: float
    value: Any = None


@dataclass(frozen=True)
class Row:
    """One candidate in one case.

    Attributes:
        seconds: median over the turns; None where no turn was timed.
        ratio: this median divided by that of the reference.
        low, high: least and greatest ratio within a turn.
        peak: peak MiB of memory of a pass, above what is in use before it; None where it was not measured.
    """

    seconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    peak: float | None = None


def take_turns(
    passes: Mapping[str, Callable[[], Any]], turns: int, clock: Callable[[], float], warm_up: int = 1, label: str = ""
) -> dict[str, list[Elapsed]]:
    """Run all candidates in every turn, in an order that alternates.

    Args:
        passes: by name of the candidate, a function that runs one pass; it may return :class:`Elapsed`.
        turns: counted turns.
        clock: gives seconds.
        warm_up: turns before them that are not counted.
        label: of the progress bar.
    """
    times: dict[str, list[Elapsed]] = {name: [] for name in passes}
    for turn in tqdm(range(warm_up + turns), desc=label, leave=False):
        for name in passes if turn % 2 else reversed(list(passes)):
            with naming(name):
                started = clock()
                value = passes[name]()
                elapsed = value if isinstance(value, Elapsed) else Elapsed(clock() - started, value)
            if turn >= warm_up:
                times[name].append(elapsed)
    return times


def rows_of(times: Mapping[str, Sequence[Elapsed]], reference: str) -> dict[str, Row]:
    """Ratio of medians to those of the reference, and the range of the ratios within a turn."""
    seconds = {name: [elapsed.seconds for elapsed in mine] for name, mine in times.items()}
    medians, rows = {name: statistics.median(mine) for name, mine in seconds.items()}, {}
    for name, mine in seconds.items():
        pairs = [one / other for one, other in zip(mine, seconds[reference])]
        rows[name] = Row(medians[name], medians[name] / medians[reference], min(pairs), max(pairs))
    return rows


@contextlib.contextmanager
def naming(candidate: str) -> Generator[None, None, None]:
    """Add the candidate's name to any exception raised inside."""
    try:
        yield
    except OVDetError as error:
        raise type(error)(f"candidate {candidate!r}: {error}") from error
    except Exception as error:
        error.add_note(f"raised by the candidate {candidate!r} of this benchmark")
        raise
