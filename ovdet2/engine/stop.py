"""Stop a training by SIGTERM or Ctrl-C: after the step, with a checkpoint; a second signal ends it immediately."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# In a group, Ctrl-C reaches a process twice: from the terminal and from the launcher.
_SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """While it is entered, SIGTERM and SIGINT are noted instead of ending the process; the second one ends it.

    A signal that is ignored, as SIGINT of a shell's background command, stays ignored. Outside of the main thread, where
    Python has no handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that was received first
        self.interrupts = False  # whether a signal is raised where it arrives, as within an evaluation
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.number:
            if comm.get_world_size() > 1 and time.monotonic() - self._since < _SAME_REQUEST_SECONDS:
                return
            self._restore()
            os.kill(os.getpid(), number)
            return
        self.number, self._since = number, time.monotonic()
        if self.interrupts:
            raise self.ending()

    @contextlib.contextmanager
    def immediate(self, enabled: bool = True) -> Generator[None, None, None]:
        """Inside, a signal is raised where it arrives, as :meth:`ending`; one that was noted before, at the entry."""
        self.interrupts = enabled
        try:
            if enabled and self.number:
                raise self.ending()
            yield
        finally:
            self.interrupts = False

    def ending(self) -> BaseException:
        """What ends the process: KeyboardInterrupt for Ctrl-C, else SystemExit with 128 + the signal's number."""
        return KeyboardInterrupt() if self.number == signal.SIGINT else SystemExit(128 + self.number)

    def agreed(self, device: torch.device) -> int:
        """The number of a signal that some process has received, the same in all of them; 0 for none."""
        if comm.get_world_size() > 1:
            flag = torch.tensor(self.number, device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.number = int(flag)
        return self.number


class StopHook(HookBase):
    """After a step in which a signal arrived: saves a checkpoint, unless the step has one, and ends the training.

    It follows the hook of checkpoints and precedes the evaluation.
    """

    def __init__(self, request: StopRequest, save: Callable[[int], object], device: torch.device) -> None:
        """
        Args:
            request: the signals of this process.
            save: writes the checkpoint after an iteration, if there is none; collective.
            device: of the model, over which the processes agree.
        """
        self.request = request
        self.save = save
        self.device = device

    def after_step(self) -> None:
        """Look at the signals."""
        if self.request.agreed(self.device):
            self.stop(self.trainer.iter)

    def stop(self, done: int) -> None:
        """Save after iteration ``done`` and end; the signal's exit code tells the caller that training is not finished."""
        self.save(done)
        # Detectron2 would evaluate after the last step, in after_train.
        self.trainer._hooks = [hook for hook in self.trainer._hooks if not isinstance(hook, hooks.EvalHook)]
        logger.warning(
            "Stopped by %s after iteration %d, with a checkpoint; --resume goes on from there.",
            signal.Signals(self.request.number).name,
            done,
        )
        raise self.request.ending()
