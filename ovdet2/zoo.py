"""Detectors by name: a configuration and the weights that belong to it.

``Detector("ovshapes-vild")`` and ``ovdet2 predict --config-file ovshapes-vild`` take these names.
"""

from __future__ import annotations

from typing import NamedTuple


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


def _of_demo(row: str) -> NamedDetector:
    config, weights = f"ovshapes/{row}_r18.yaml", f"output/ovshapes/{row}/seed0/model_final.pth"
    return NamedDetector(config, weights, "train it with `ovdet2 demo`, in this folder")


DETECTORS = {
    "ovshapes-vild-text": _of_demo("vild_text"),
    "ovshapes-vild": _of_demo("vild"),
    "ovshapes-vild-ensemble": _of_demo("vild_ensemble"),
}
