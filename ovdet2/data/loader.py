"""Data loaders: for training, over one or several sources, and for evaluation.

The position of a training loader is one number per source, so that a resumed run sees exactly the images that an
uninterrupted run sees; see :mod:`ovdet2.data.stream`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from tqdm import tqdm

from ovdet2.data.mapped_records import MappedRecords, plain_loader
from ovdet2.data.records import load_records
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.data.samples import Sample
from ovdet2.data.source_spec import ALTERNATE, PARALLEL, TRAIN, test_spec
from ovdet2.data.sources import Record, TrainSource, build_sources
from ovdet2.data.stream import BATCH_KEY, SourceStream
from ovdet2.errors import CacheError, DataError, SetupError

logger = logging.getLogger(__name__)


class TrainLoader:
    """Endless iterable of batches (lists of :class:`Sample`) with a position that is saved and restored.

    Attributes:
        sources: in the order of a batch.
        streams: :class:`SourceStream` of each.
    """

    def __init__(
        self, sources: Sequence[TrainSource], mix: str = PARALLEL, *, num_workers: int = 0, max_bad: int = 0
    ) -> None:
        """
        Args:
            sources: the first one has the random draws of a run with this source only; each other one is seeded
                differently.
            mix: "parallel": a batch holds the samples of all sources, one source after another. "alternate": a batch
                holds the samples of one source, see :func:`next_source`.
            num_workers: loading processes of this process for each source.
            max_bad: unreadable images of a source tolerated in the run.

        Raises:
            UsageError: see :class:`SourceStream`.
        """
        self.sources = list(sources)
        self.mix = mix
        self.streams = [_stream(source, number, num_workers, max_bad) for number, source in enumerate(sources)]
        self._ratios = [float(source.spec.ratio) for source in sources]
        self._turns = [0] * len(self.sources)

    @property
    def alternates(self) -> bool:
        """Whether some steps have no samples of some sources."""
        return self.mix == ALTERNATE and len(self.sources) > 1

    @property
    def bad_images(self) -> dict[str, str]:
        """{path: reason} of the unreadable images that this process has tried to load."""
        return {path: reason for stream in self.streams for path, reason in stream.bad_images.items()}

    def __iter__(self) -> Iterator[list[Sample]]:
        batches = [iter(stream) for stream in self.streams]
        while True:
            if not self.alternates:
                yield self._of_all(batches)
                continue
            chosen = next_source(self._turns, self._ratios)
            batch = next(batches[chosen])
            self._turns[chosen] += 1
            yield batch

    def _of_all(self, batches: Sequence[Iterator[list[Sample]]]) -> list[Sample]:
        """The samples of a step from all sources. If one source fails, the positions of the others stay those before."""
        before = [stream.consumed for stream in self.streams]
        try:
            return [sample for of_source in batches for sample in next(of_source)]
        except SetupError:
            for stream, consumed in zip(self.streams, before):
                stream.consumed = consumed
            raise

    def state_dict(self) -> dict[str, Any]:
        """The position of each source; a collective call, complete on rank 0."""
        saved = {}
        for source, stream, ratio, turns in zip(self.sources, self.streams, self._ratios, self._turns):
            saved[source.spec.name] = stream.state_dict() | {"ratio": ratio, "turns": turns}
        return {"mix": self.mix, "sources": saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at saved positions; see :meth:`SourceStream.load_state_dict`.

        Sources that the saved run did not have start at their beginning. If the sources or their ratios differ, the
        turns of "alternate" start anew. A state of a version without sources is read as the state of the first source.
        """
        if "sources" not in state:
            state = {"mix": PARALLEL, "sources": {self.sources[0].spec.name: state}}
        saved, names = state["sources"], [source.spec.name for source in self.sources]
        if set(saved) != set(names):
            logger.warning(
                "The saved run had the sources %s, this one has %s: the sources of both continue, but the run is not "
                "the same as an uninterrupted one.",
                ", ".join(saved),
                ", ".join(names),
            )
        for name, stream in zip(names, self.streams):
            if name in saved:
                stream.load_state_dict(saved[name])
        ratios = {name: of_source.get("ratio") for name, of_source in saved.items()}
        if state["mix"] == self.mix and ratios == dict(zip(names, self._ratios)):
            self._turns = [saved[name]["turns"] for name in names]


def next_source(turns: Sequence[int], ratios: Sequence[float]) -> int:
    """Index of the source of the next step: the one furthest behind its share of the steps; of several, the first.

    Args:
        turns: steps that each source has had.
        ratios: above 0.
    """
    step, total = sum(turns) + 1, sum(ratios)
    behind = [ratio * step - turn * total for turn, ratio in zip(turns, ratios)]
    return behind.index(max(behind))


def _stream(source, number, num_workers, max_bad):
    entropy = (number,) if number else ()  # the first source draws as if it were the only one
    dataset = MappedRecords(source.records, source.maker, source.seed, max_bad, entropy)
    name = source.spec.name
    return SourceStream(
        dataset,
        source.make_sampler,
        source.spec.images_per_step,
        wide=source.wide,
        seed=source.seed,
        num_workers=num_workers,
        key=BATCH_KEY if name == TRAIN else f"images of {name} in DATASETS.SOURCES",
    )


class TestLoader:
    """One image per batch, each on exactly one process; an unreadable image is an error, for it changes the metric."""

    __test__ = False  # pytest must not collect this class as a test case

    def __init__(self, dataset: MappedRecords, num_workers: int = 0) -> None:
        self.dataset = dataset
        self._loader = plain_loader(dataset, num_workers, batch_size=1, sampler=InferenceSampler(len(dataset)))

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[Sample]]:
        for ((sample, faults),) in self._with_progress():
            if isinstance(sample, CacheError):
                raise sample
            if sample is None:
                raise DataError(f"{faults[0][1]} An evaluation image cannot be skipped: the metric would change.")
            yield [sample]

    def _with_progress(self) -> Iterator[Any]:
        shown = comm.is_main_process() and sys.stderr.isatty()
        return iter(tqdm(self._loader, desc="evaluating", unit="image", dynamic_ncols=True, disable=not shown))


def build_train_loader(cfg: CfgNode, maker: Callable[[Record], Any] | None = None) -> TrainLoader:
    """The training loader of a configuration, see :func:`~ovdet2.data.sources.build_sources`.

    Args:
        cfg: configuration.
        maker: callable of a record for the first source; None: :func:`~ovdet2.data.sample_maker.build_sample_maker`.

    Raises:
        UsageError, DataError, CacheError: see :func:`build_sources` and :class:`TrainLoader`.
    """
    workers, max_bad = cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.MAX_BAD_IMAGES
    return TrainLoader(build_sources(cfg, maker), cfg.DATALOADER.MIX, num_workers=workers, max_bad=max_bad)


def build_test_loader(cfg: CfgNode, dataset_name: str, maker: Callable[[Record], Any] | None = None) -> TestLoader:
    """The loader of one evaluation set, over all of its records, including those without annotations."""
    records = load_records([dataset_name], "DATASETS.TEST", filter_empty=False)
    maker = build_sample_maker(cfg, False, test_spec([dataset_name])) if maker is None else maker
    return TestLoader(MappedRecords(records, maker), cfg.DATALOADER.NUM_WORKERS)
