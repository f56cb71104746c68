"""The last step: drop the fields that only steps read, so that they are not sent to the training process."""

from __future__ import annotations

from ovdet2.data.samples import Sample
from ovdet2.data.steps.step import Step


class Finish(Step):
    """Drops ``pixels``, ``transforms``, ``annotations`` and ``annotation_indices``."""

    def __call__(self, sample: Sample) -> None:
        sample.pixels = sample.transforms = sample.annotations = sample.annotation_indices = None
