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
        self.loader = DataLoader(dataset, num_workers=num_workers, worker_init_fn=_prepare_worker, **arguments)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """
        Raises:
            WorkerError: see the class; names shared memory and DATALOADER.NUM_WORKERS.
        """
        batches: Any = iter(self.loader)
        workers = getattr(batches, "_workers", [])
        with _Watch(workers, self.patience) if workers else contextlib.nullcontext() as watch:
            try:
                while (batch := _next(batches, watch)) is not None:
                    yield batch[0]
            finally:
                if workers:
                    batches._shutdown_workers()


def _next(batches, watch):
    """The next batch, in a tuple; None at the end."""
    try:
        if watch is None:
            return (next(batches),)
        with watch.waiting():
            return (next(batches),)
    except StopIteration:
        return None
    except (RuntimeError, OSError, EOFError) as error:
        # The others arise where the connection to a process ends that was about to hand a sample over.
        fault = None if watch is None or isinstance(error, OVDetError) else watch.fault(error)
        if fault is None:
            raise
        _end(watch.workers, batches)
        raise WorkerError(f"{fault} {remedy()}") from None


class _Watch:
    """A thread that looks at the loading processes while a batch is waited for, and kills those that give none.

    torch's DataLoader notices those that have ended, but it waits for ever for one that is stopped while the file
    descriptor of a sample is fetched from it. When that one is killed, the connection ends, and so does the wait.
    """

    def __init__(self, workers: Sequence[Any], patience: float) -> None:
        self.workers, self._patience = workers, patience
        self._since: float | None = None  # when the wait for a batch began
        self._found: str | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "_Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @contextlib.contextmanager
    def waiting(self) -> Generator[None, None, None]:
        """Inside, a batch is waited for."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def fault(self, error: BaseException) -> str | None:
        """What is wrong with the loading processes after an error, in a sentence; None: it is an error of the data."""
        if self._found is not None:
            return self._found
        ended = [(worker.pid, worker.exitcode) for worker in self.workers if not worker.is_alive() and worker.exitcode]
        if any(code == _NOT_HANDED_OVER for _, code in ended):
            return "A loading process could not hand over a sample (its error is printed above)."
        for pid, code in ended:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"Loading process {pid} {how}."
        reason = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and "DataLoader" in reason:
            return f"A loading process has ended ({reason.rstrip('.')})."
        return None

    def _look(self) -> None:
        before: set[int] = set()
        left = list(self.workers)
        while not self._over.wait(min(_LOOK_SECONDS, self._patience)):
            since = self._since
            stopped = {worker.pid for worker in left if since is not None and _is_stopped(worker.pid)}
            # Twice: after Ctrl-Z and fg, the processes of a run continue one after another.
            if lasting := sorted(stopped & before):
                self._found = self._found or (
                    f"Loading process {lasting[0]} is stopped (continue it with kill -CONT {lasting[0]} before a run)."
                )
            elif since is not None and time.monotonic() - since > self._patience:
                self._found = self._found or f"{len(self.workers)} loading processes gave no batch for a long time."
            before = stopped
            if self._found is not None and left:
                # One in each turn: the main thread gets a signal, and two signals would raise two errors.
                left.sort(key=lambda worker: worker.pid not in lasting)
                left.pop(0).kill()


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
