"""The data set mapper: makes a training or test sample of a record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from ovdet2.data.samples import BOXES, Sample
from ovdet2.data.source_spec import SourceSpec, test_spec, train_spec
from ovdet2.data.steps import build_steps
from ovdet2.data.steps.step import Step


class SampleMaker:
    """Maps a record to a sample by applying steps in order.

    Attributes:
        steps: in the order in which they are applied.
        kind, source: annotation kind and source name that the samples get.
    """

    def __init__(self, steps: Sequence[Step], kind: str = BOXES, source: str = "") -> None:
        """
        Args:
            steps: see :func:`~ovdet2.data.steps.build_steps`.
            kind: one of :data:`~ovdet2.data.samples.KINDS`.
            source: name of the source.
        """
        self.steps = list(steps)
        self.kind, self.source = kind, source

    def __call__(self, record: Sample | Mapping[str, Any]) -> Sample | None:
        """
        Args:
            record: dict in Detectron2's standard form, with "file_name" and the "annotations", "captions" or "labels"
                of the image; or a Sample. It is not changed.

        Returns:
            :class:`Sample`; None from a subclass that skips the image.

        Raises:
            DataError: the image cannot be used.
            CacheError: an offline artefact does not fit the image.
        """
        sample = dataclasses.replace(Sample.of(record), kind=self.kind, source=self.source, attachments={})
        for step in self.steps:
            step(sample)
        return sample


def build_sample_maker(cfg: CfgNode, is_train: bool, source: SourceSpec | None = None) -> SampleMaker:
    """The maker of a source.

    Args:
        cfg: configuration.
        is_train: see :func:`~ovdet2.data.steps.build_steps`.
        source: of the images; None: DATASETS.TRAIN in training, DATASETS.TEST otherwise.

    Raises:
        UsageError, CacheError: see :func:`~ovdet2.data.steps.build_steps`.
    """
    if source is None:
        source = train_spec(cfg) if is_train else test_spec(cfg.DATASETS.TEST)
    return SampleMaker(build_steps(cfg, source, is_train), source.kind, source.name)
