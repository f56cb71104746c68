"""What a terminal shows of a run: stages, progress bars, warnings and the final table. Everything goes to log.txt."""

from __future__ import annotations

import logging
import sys

from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

LOGGERS = ("fvcore", "detectron2", "ovdet2")

# Warnings of other packages that need no attention, by logger and first words; log.txt has them.
SILENCED = (
    # AtomicCheckpointer states all three in one line; the heads are missing in every training from a trunk's weights.
    ("fvcore.common.checkpoint", "Some model parameters or buffers are not found"),
    ("fvcore.common.checkpoint", "The checkpoint state_dict contains keys that are not used"),
    ("fvcore.common.checkpoint", "Skip loading parameter"),
)


def open_logs(folder: str = "", rank: int = 0) -> None:
    """Log everything to ``folder``/log.txt, and on rank 0 show on the terminal what a user needs.

    Args:
        folder: of the run; empty: only the terminal.
        rank: of this process; every process but the first writes log.txt.rank<number>.
    """
    for name in LOGGERS:
        logger = setup_logger(folder or None, distributed_rank=rank, name=name)
        to_terminal = [
            handler
            for handler in logger.handlers
            if isinstance(handler, Console) or getattr(handler, "stream", None) is sys.stdout
        ]
        for handler in to_terminal:
            logger.removeHandler(handler)
        if to_terminal:  # empty except in the first process
            logger.addHandler(Console())


class Console(logging.Handler):
    """Messages of ovdet2, and warnings of other packages, without time and place, above any progress bar."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the terminal shows a record."""
        if record.levelno < logging.WARNING:
            # Without a terminal there is no progress bar: the metrics of every few steps are printed instead.
            lines = record.name == "detectron2.utils.events" and not has_terminal()
            return record.name.split(".")[0] == "ovdet2" or lines
        text = record.getMessage()
        return not any(record.name == name and text.startswith(start) for name, start in SILENCED)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
        text = level + record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        tqdm.write(text, file=sys.stdout)


def has_terminal() -> bool:
    """Whether progress bars are drawn."""
    return sys.stderr.isatty()


class TrainingBar(HookBase):
    """A progress bar of the steps, with the latest total loss; nothing without a terminal."""

    _bar: tqdm | None = None

    def before_train(self) -> None:
        """Open the bar."""
        self._bar = tqdm(
            total=self.trainer.max_iter,
            initial=self.trainer.start_iter,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=not has_terminal(),
        )

    def after_step(self) -> None:
        """Count a step."""
        assert self._bar is not None  # of before_train
        latest = self.trainer.storage.latest().get("total_loss")
        if latest is not None:
            self._bar.set_postfix(loss=f"{latest[0]:.3f}", refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        """Close the bar; without one, another hook has failed before the first step."""
        if self._bar is not None:
            self._bar.close()
