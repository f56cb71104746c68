"""The sources of a training run: records, sample maker and sampler of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from ovdet2.data.records import load_records, require_one_base
from ovdet2.data.sample_maker import SampleMaker, build_sample_maker
from ovdet2.data.samples import BOXES, CAPTIONS, IMAGE_LABELS, Records
from ovdet2.data.source_spec import TRAIN, SourceSpec, source_specs
from ovdet2.data.steps.step import Step
from ovdet2.data.stream import SamplerFactory
from ovdet2.errors import UsageError

Record = Mapping[str, Any]


@dataclass
class TrainSource:
    """A source of training images with its records, sample maker and sampler.

    Attributes:
        spec: :class:`SourceSpec`.
        records: Detectron2 records; an item may be made lazily.
        maker: callable that maps a record to a sample, :class:`SampleMaker`.
        make_sampler: function of a seed that returns the index sampler of this process.
        seed: of order and augmentations, the same in every process.
        wide: for each record whether it is wider than high, for batches of one orientation; None: batches in drawn
            order.
    """

    spec: SourceSpec
    records: Records
    maker: SampleMaker | Callable[[Record], Any]
    make_sampler: SamplerFactory
    seed: int = 0
    wide: Sequence[bool] | None = None

    @property
    def steps(self) -> Sequence[Step]:
        """The steps of the maker; empty if it has none."""
        return getattr(self.maker, "steps", ())


def build_sources(cfg: CfgNode, maker: Callable[[Record], Any] | None = None) -> list[TrainSource]:
    """The sources of a configuration, see :func:`~ovdet2.data.source_spec.source_specs`.

    Args:
        cfg: configuration (DATASETS.*, DATALOADER.*, INPUT.*, SOLVER.IMS_PER_BATCH, SEED).
        maker: callable of a record for the first source; None: :func:`build_sample_maker`.

    Raises:
        UsageError, DataError, CacheError: see :func:`source_specs`, :func:`load_records`, :func:`require_one_base` and
            :func:`build_sample_maker`.
    """
    specs = source_specs(cfg)
    records = [_records_of(cfg, spec) for spec in specs]
    require_one_base(cfg, [name for spec in specs if spec.kind != CAPTIONS for name in spec.datasets])
    # A negative SEED means a random one, drawn once and saved with the position.
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    makers = [maker, *[None] * (len(specs) - 1)]
    return [
        _source(cfg, spec, of_source, seed, given)
        for spec, of_source, given in zip(specs, records, makers, strict=True)
    ]


def _records_of(cfg: CfgNode, spec: SourceSpec) -> Sequence[Record]:
    key = TRAIN if spec.name == TRAIN else f"the source {spec.name}"
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and spec.kind == BOXES
    return load_records(spec.datasets, key, filter_empty, base_only=True, kind=spec.kind)


def _source(
    cfg: CfgNode, spec: SourceSpec, records: Sequence[Record], seed: int, maker: Callable[[Record], Any] | None
) -> TrainSource:
    wide = None
    # The records of a lazy reader are not grouped by orientation: that would read them all.
    listed = isinstance(records, list)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING and listed and all("width" in r and "height" in r for r in records):
        wide = [record["width"] > record["height"] for record in records]
    maker = build_sample_maker(cfg, True, spec) if maker is None else maker
    sampler = sampler_factory(cfg, spec, records)
    return TrainSource(spec, DatasetFromList(records, copy=False) if listed else records, maker, sampler, seed, wide)


def sampler_factory(cfg: CfgNode, spec: SourceSpec, records: Sequence[Record]) -> SamplerFactory:
    """A function of a seed that returns the index sampler of a source for this process.

    Raises:
        UsageError: unknown sampler, or one that needs classes for a source without classes.
    """
    name = spec.sampler or (cfg.DATALOADER.SAMPLER_TRAIN if spec.kind == BOXES else "TrainingSampler")
    count = len(records)  # so that the returned function does not hold the list
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(count, seed=seed)
    if name == "RepeatFactorTrainingSampler" and spec.kind != CAPTIONS:
        if spec.kind == IMAGE_LABELS:
            records = [{"annotations": [{"category_id": label} for label in record["labels"]]} for record in records]
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    key = f"the sampler of {spec.name}" if spec.sampler else "DATALOADER.SAMPLER_TRAIN"
    raise UsageError(
        f"{key} is {name!r}: use 'TrainingSampler' or, for a source with classes, 'RepeatFactorTrainingSampler'."
    )
