"""Specifications of the sources of training images, from the configuration and from methods."""

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
    """One or several training data sets with their batch size, sampler and image sizes.

    Attributes:
        name: of the source in logs and checkpoints, unique in a run.
        datasets: names of registered data sets of one kind.
        images_per_step: images of a step over all processes.
        kind: annotation kind of the data sets, one of :data:`~ovdet2.data.samples.KINDS`.
        sampler: as DATALOADER.SAMPLER_TRAIN; empty: the sampler of that key for boxes, "TrainingSampler" otherwise.
        min_sizes, max_size: as INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN; empty and 0: the values of these keys.
        ratio: if sources alternate, this source's share of the steps, relative to the other sources' ratios.
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
    """The source of the data sets of an evaluation, one image per batch."""
    return SourceSpec(", ".join(datasets), tuple(datasets), 1)


vars(test_spec)["__test__"] = False  # pytest must not collect this function as a test


def source_specs(cfg: CfgNode) -> list[SourceSpec]:
    """The sources of a run: DATASETS.TRAIN, the entries of DATASETS.SOURCES, then the sources of methods.

    An entry replaces the source of a method that has the same name. DATASETS.TRAIN may be empty if there are other
    sources.

    Raises:
        UsageError: an entry of another form, two entries with one name, a data set whose annotation kind is not that of
            its source, or an unknown DATALOADER.MIX.
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
        raise UsageError(
            f"several sources of training images are named {', '.join(twice)}: give each source another name."
        )
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
    """Annotation kind of a registered data set: boxes unless its metadata ``ov_kind`` states another kind."""
    from detectron2.data import MetadataCatalog

    import ovdet2.data.datasets  # noqa: F401  registers the data sets

    return MetadataCatalog.get(dataset).get("ov_kind", BOXES)


def _of_entry(entry):
    unknown = set(entry) - set(_ENTRY) if isinstance(entry, Mapping) else {entry}
    lacking = {"name", "images"} - set(entry) if isinstance(entry, Mapping) else ()
    if unknown or lacking:
        raise UsageError(
            f"an entry of DATASETS.SOURCES has the unknown keys {sorted(map(str, unknown))} and lacks "
            f"{sorted(lacking)}: give name and images, and optionally {', '.join(_ENTRY[2:])}."
        )
    name, sizes, max_size = entry["name"], entry.get("min_size") or (), entry.get("max_size") or 0
    sizes = (sizes,) if isinstance(sizes, int) else sizes
    datasets = entry.get("datasets") or (name,)
    lists = isinstance(datasets, (list, tuple)) and isinstance(sizes, (list, tuple))
    if not lists or not all(isinstance(text, str) and text for text in (name, *datasets)):
        raise UsageError(
            f"an entry of DATASETS.SOURCES has the name {name!r} and the datasets {datasets!r}: give text, and a list of "
            "names."
        )
    if not all(type(size) is int and size > 0 for size in sizes) or type(max_size) is not int or max_size < 0:
        raise UsageError(f"the source {name} has min_size {sizes!r} and max_size {max_size!r}: give pixels, above 0.")
    return SourceSpec(
        name=name,
        datasets=tuple(datasets),
        images_per_step=entry["images"],
        kind=entry.get("kind") or kind_of(datasets[0]),
        sampler=entry.get("sampler") or "",
        min_sizes=tuple(sizes),
        max_size=max_size,
        ratio=entry.get("ratio", 1.0),
    )


def _check(spec):
    for dataset in spec.datasets:
        if spec.kind not in KINDS or kind_of(dataset) != spec.kind:
            raise UsageError(
                f"{dataset} is a data set of {kind_of(dataset)}, the source {spec.name} is of {spec.kind}: "
                "DATASETS.TRAIN takes data sets of boxes; name others in DATASETS.SOURCES, one kind per entry."
            )
    if type(spec.images_per_step) is not int or not isinstance(spec.ratio, (int, float)) or not spec.ratio > 0:
        raise UsageError(
            f"the source {spec.name} has {spec.images_per_step!r} images per step and the ratio {spec.ratio!r}: give "
            "an integer number of images over all processes, and a ratio above 0."
        )
