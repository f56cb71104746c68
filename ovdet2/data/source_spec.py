"""Sources of training images, as the configuration and methods name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from ovdet2.config.methods import methods_of
from ovdet2.data.samples import BOXES, KINDS
from ovdet2.errors import UsageError

TRAIN = "DATASETS.TRAIN"  # name of the source with these data sets
PARALLEL, ALTERNATE = "parallel", "alternate"
MIXES = (PARALLEL, ALTERNATE)
_ENTRY = ("name", "images", "datasets", "kind", "sampler", "min_size", "max_size", "ratio")


@dataclass(frozen=True)
class SourceSpec:
    """One or several data sets that are drawn from in training, with their own batch size, sampler and image sizes.

    Attributes:
        name: of the source in logs and checkpoints, unique in a run.
        datasets: names of registered data sets of one kind.
        images_per_step: images of a step over all processes.
        kind: what the data sets know of their images, one of :data:`~ovdet2.data.samples.KINDS`.
        sampler: as DATALOADER.SAMPLER_TRAIN; empty: that one for boxes, "TrainingSampler" otherwise.
        min_sizes, max_size: as INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN; empty and 0: those.
        ratio: steps of this source to those of the others, where sources alternate.
    """

    name: str
    datasets: tuple[str, ...]
    images_per_step: int
    kind: str = BOXES
    sampler: str = ""
    min_sizes: tuple[int, ...] = ()
    max_size: int = 0
    ratio: float = 1.0


def train_spec(cfg: CfgNode) -> SourceSpec:
    """The source of DATASETS.TRAIN, with SOLVER.IMS_PER_BATCH images a step."""
    return SourceSpec(TRAIN, tuple(cfg.DATASETS.TRAIN), cfg.SOLVER.IMS_PER_BATCH)


def test_spec(datasets: Sequence[str]) -> SourceSpec:
    """Data sets of an evaluation, one image at a time."""
    return SourceSpec(", ".join(datasets), tuple(datasets), 1)


vars(test_spec)["__test__"] = False  # the name is no test for pytest


def source_specs(cfg: CfgNode) -> list[SourceSpec]:
    """DATASETS.TRAIN, the entries of DATASETS.SOURCES, then what methods add.

    A source of a method is replaced by the entry of its name. DATASETS.TRAIN may be empty where there are others.

    Raises:
        UsageError: an entry of another form, two of one name, a data set of another kind than stated or than
            DATASETS.TRAIN holds, or no such DATALOADER.MIX.
    """
    if cfg.DATALOADER.MIX not in MIXES:
        raise UsageError(f"DATALOADER.MIX is {cfg.DATALOADER.MIX!r}: choose {' or '.join(MIXES)}.")
    specs = [_of_entry(entry) for entry in cfg.DATASETS.SOURCES]
    named = {spec.name for spec in specs}
    specs += [spec for method in methods_of(cfg) for spec in method.sources(cfg) if spec.name not in named]
    if cfg.DATASETS.TRAIN or not specs:
        specs.insert(0, train_spec(cfg))
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"several sources of training images are named {', '.join(twice)}: name each once.")
    for spec in specs:
        _check(spec)
    return specs


def entries_of(specs: Sequence[SourceSpec]) -> list[dict[str, Any]]:
    """Sources in the form of DATASETS.SOURCES."""
    return [
        {
            "name": spec.name,
            "datasets": list(spec.datasets),
            "images": spec.images_per_step,
            "kind": spec.kind,
            "sampler": spec.sampler,
            "min_size": list(spec.min_sizes),
            "max_size": spec.max_size,
            "ratio": spec.ratio,
        }
        for spec in specs
    ]


def kind_of(dataset: str) -> str:
    """What a registered data set knows of its images; boxes unless its metadata ``ov_kind`` states another kind."""
    from detectron2.data import MetadataCatalog

    import ovdet2.data.datasets  # noqa: F401  registers the data sets

    return MetadataCatalog.get(dataset).get("ov_kind", BOXES)


def _of_entry(entry):
    unknown = set(entry) - set(_ENTRY) if isinstance(entry, Mapping) else {entry}
    lacking = {"name", "images"} - set(entry) if isinstance(entry, Mapping) else ()
    if unknown or lacking:
        raise UsageError(
            f"an entry of DATASETS.SOURCES has {sorted(map(str, unknown))} that is not known and lacks "
            f"{sorted(lacking)}: it is {{name, images}} with {', '.join(_ENTRY[2:])} if needed."
        )
    sizes = entry.get("min_size") or ()
    datasets = tuple(entry.get("datasets") or (entry["name"],))
    return SourceSpec(
        name=entry["name"],
        datasets=datasets,
        images_per_step=entry["images"],
        kind=entry.get("kind") or kind_of(datasets[0]),
        sampler=entry.get("sampler") or "",
        min_sizes=(sizes,) if isinstance(sizes, int) else tuple(sizes),
        max_size=entry.get("max_size") or 0,
        ratio=entry.get("ratio", 1.0),
    )


def _check(spec):
    for dataset in spec.datasets:
        if spec.kind not in KINDS or kind_of(dataset) != spec.kind:
            raise UsageError(
                f"{dataset} is a data set of {kind_of(dataset)}, the source {spec.name} is of {spec.kind}: "
                "DATASETS.TRAIN takes data sets of boxes; name others in DATASETS.SOURCES, those of one kind together."
            )
    if not isinstance(spec.images_per_step, int) or not isinstance(spec.ratio, (int, float)) or not spec.ratio > 0:
        raise UsageError(
            f"the source {spec.name} has {spec.images_per_step!r} images a step and the ratio {spec.ratio!r}: give a "
            "number of images over all processes, and a ratio above 0."
        )
