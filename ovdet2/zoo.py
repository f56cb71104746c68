"""Detectors by name: a configuration and the weights that belong to it.

``Detector("ovshapes-vild")`` takes these names, and ``--config-file ovshapes-vild`` in every command but
``ovdet2 train``, for these are trained detectors.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ovdet2.errors import DataError


class NamedDetector(NamedTuple):
    """A trained detector.

    Attributes:
        config: name of a shipped configuration.
        weights: checkpoint, as for MODEL.WEIGHTS: a path, a URL, or ``ovdet2://`` and a file of ovdet2/assets.
        remedy: what to do if ``weights`` is a path and there is no such file.
    """

    config: str
    weights: str
    remedy: str

    def require(self, weights: str) -> None:
        """Check that the detector's weights are there, if ``weights`` are those and not others given by the user.

        Raises:
            DataError: they are a file that does not exist.
        """
        if weights == self.weights and "://" not in weights and not Path(weights).is_file():
            raise DataError(f"{weights} does not exist: {self.remedy}.")


def _of_demo(row: str) -> NamedDetector:
    config, weights = f"ovshapes/{row}_r18.yaml", f"output/ovshapes/{row}/seed0/model_final.pth"
    return NamedDetector(config, weights, "train it with `ovdet2 demo`, in this folder")


DETECTORS = {
    "ovshapes-vild-text": _of_demo("vild_text"),
    "ovshapes-vild": _of_demo("vild"),
    "ovshapes-vild-ensemble": _of_demo("vild_ensemble"),
}
