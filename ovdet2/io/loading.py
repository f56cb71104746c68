"""Loading processes that are watched: one that was killed, stopped or cannot hand over its samples ends in a message."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import queues
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ovdet2.errors import OVDetError, SetupError
from ovdet2.io.shared_memory import remedy

PATIENCE_SECONDS = 600.0  # for a batch
_LOOK_SECONDS = 5.0  # between two looks at the processes while there is no batch
_NOT_HANDED_OVER = 77  # exit code


class WorkerError(SetupError):
    """A loading process was killed or stopped, or gives no samples any more."""


class WatchedLoader:
    """torch's DataLoader; where it would wait for ever for its processes, a :class:`WorkerError` is raised."""

    def __init__(
        self, dataset: Dataset, num_workers: int = 0, patience: float = PATIENCE_SECONDS, **arguments: Any
    ) -> None:
        """
        Args:
            dataset: a torch Dataset.
            num_workers: loading processes; with 0, nothing is watched.
            patience: seconds that a batch may take.
            arguments: of torch's DataLoader.
        """
        self.patience = patience
        look = min(_LOOK_SECONDS, patience) if num_workers else 0
        self.loader = DataLoader(
            dataset, num_workers=num_workers, timeout=look, worker_init_fn=_prepare_worker, **arguments
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """
        Raises:
            WorkerError: see the class; names shared memory and DATALOADER.NUM_WORKERS.
        """
        batches: Any = iter(self.loader)
        workers = getattr(batches, "_workers", [])
        try:
            while (batch := self._next(batches, workers)) is not None:
                yield batch[0]
        finally:
            if workers:
                batches._shutdown_workers()

    def _next(self, batches: Any, workers: Sequence[Any]) -> tuple[Any] | None:
        """The next batch, in a tuple; None at the end."""
        since = time.monotonic()
        while True:
            try:
                return (next(batches),)
            except StopIteration:
                return None
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                if not workers or isinstance(error, OVDetError) or "DataLoader" not in reason:
                    raise
                fault = _fault(workers, reason, time.monotonic() - since > self.patience)
                if fault is not None:  # else torch's loader has lost nothing
                    _end(workers, batches)
                    raise WorkerError(f"{fault} {remedy()}") from None


def _fault(workers: Sequence[Any], reason: str, impatient: bool) -> str | None:
    """What is wrong with the loading processes, in a sentence; None if they may only be slow."""
    if "timed out" not in reason:
        ended = [(worker.pid, worker.exitcode) for worker in workers if not worker.is_alive() and worker.exitcode]
        if any(code == _NOT_HANDED_OVER for _, code in ended):
            return "A loading process could not hand over a sample (its error is printed above)."
        for pid, code in ended:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"Loading process {pid} {how}."
        return f"A loading process has ended ({reason.rstrip('.')})."
    if stopped := [worker.pid for worker in workers if _is_stopped(worker.pid)]:
        return f"Loading process {stopped[0]} is stopped (continue it with kill -CONT {stopped[0]} before a run)."
    return f"{len(workers)} loading processes gave no batch for a long time." if impatient else None


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):  # ended, or not Linux
        return False


def _end(workers: Sequence[Any], batches: Any) -> None:
    """Kill loading processes. At its end Python would wait for them, for ever if they are stopped."""
    with _without_child_handler():
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
        batches._shutdown_workers()


@contextlib.contextmanager
def _without_child_handler() -> Generator[None, None, None]:
    """Inside, torch's handler of ended processes, which raises, is not called."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _prepare_worker(_: int) -> None:
    """In a loading process: Ctrl-C is the main process's to handle; a sample that cannot be handed over ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # By default the error is printed and the sample lost, so that the main process waits for it.
    queues.Queue._on_queue_feeder_error = staticmethod(_not_handed_over)  # pyrefly: ignore[missing-attribute]


def _not_handed_over(error: BaseException, _: object) -> None:
    print(f"A sample cannot be handed over: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(_NOT_HANDED_OVER)
