"""The last step: nothing that only the steps need travels to the trainer."""

from __future__ import annotations

from ovdet2.data.samples import Sample
from ovdet2.data.steps.step import Step


class Finish(Step):
    """Drops ``pixels``, ``transforms``, ``annotations`` and ``kept``."""

    def __call__(self, sample: Sample) -> None:
        sample.pixels = sample.transforms = sample.annotations = sample.kept = None
