"""Evaluation of one detector under several configurations that differ only in what is read at test."""

from typing import Any

from detectron2.config import CfgNode


class SharedDetector:
    """A detector that is built for the first evaluation and used again for the later ones."""

    def __init__(self) -> None:
        self._model: Any = None

    def evaluate(self, cfg: CfgNode) -> None:
        """Evaluate MODEL.WEIGHTS on DATASETS.TEST; reports go below OUTPUT_DIR.

        Raises:
            UsageError, DataError: see :meth:`ovdet2.engine.Trainer.build_trained` and :meth:`~ovdet2.engine.Trainer.test`.
        """
        from ovdet2.engine import Trainer  # slow to import, so after the checks of the most frequent errors
        from ovdet2.engine.console import open_logs

        if self._model is None:
            open_logs()
            self._model = Trainer.build_trained(cfg)
        Trainer.test(cfg, self._model)
