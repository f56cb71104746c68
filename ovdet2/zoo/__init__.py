"""Detectors by name: a configuration and the weights that belong to it.

``Detector("ovshapes-vild")`` takes these names, and ``--config-file ovshapes-vild`` in every command but
``ovdet2 train``, for these are trained detectors. Those of the demo are trained on this machine. The others are
published: :mod:`ovdet2.zoo.records` has their data, :mod:`ovdet2.zoo.store` fetches and imports them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError
from ovdet2.zoo.records import RECORDS, weights_path


@dataclass(frozen=True)
class NamedDetector:
    """A trained detector.

    Attributes:
        config: name of a shipped configuration.
        remedy: what to do if the weights are a path and there is no such file.
        path: checkpoint of a detector that is trained on this machine; "" for a published one.
        published: name of its record, or "".
        overrides: KEY VALUE pairs that its weights need.
    """

    config: str
    remedy: str
    path: str = ""
    published: str = ""
    overrides: tuple[Any, ...] = ()

    @property
    def weights(self) -> str:
        """Checkpoint for MODEL.WEIGHTS; of a published detector in the folder that OVDET2_HOME names now."""
        return str(weights_path(self.published)) if self.published else self.path

    def require(self, weights: str) -> None:
        """Check that the detector's weights are there, if ``weights`` are those and not others given by the user.

        Raises:
            DataError: they are a file that does not exist.
        """
        if weights == self.weights and "://" not in weights and not Path(weights).is_file():
            raise DataError(f"{weights} does not exist: {self.remedy}.")


def _of_demo(row: str) -> NamedDetector:
    config, weights = f"ovshapes/{row}_r18.yaml", f"output/ovshapes/{row}/seed0/model_final.pth"
    return NamedDetector(config, "train it with `ovdet2 demo`, in this folder", weights)


DETECTORS = {
    "ovshapes-vild-text": _of_demo("vild_text"),
    "ovshapes-vild": _of_demo("vild"),
    "ovshapes-vild-ensemble": _of_demo("vild_ensemble"),
} | {
    name: NamedDetector(
        record.config, f"run `ovdet2 zoo fetch {name}`", published=name, overrides=tuple(record.overrides)
    )
    for name, record in RECORDS.items()
}
