"""A torch Dataset that maps records to samples; each draw is seeded separately."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.data.common import DatasetFromList
from torch.utils.data import Dataset

from ovdet2.data.samples import Records, Sample
from ovdet2.errors import CacheError, DataError
from ovdet2.io.loading import WatchedLoader

Maker = Callable[[Any], Any]
Fault = tuple[str, str]  # path, reason
Item = tuple[Sample | CacheError | None, list[Fault]]


@contextlib.contextmanager
def seeded(*entropy: int) -> Generator[None, None, None]:
    """Seed python's, numpy's and torch's global generators inside the block; restore them after it."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


class MappedRecords(Dataset):
    """Samples that a maker makes of records; in training, an image that cannot be used is replaced by another one.

    An item is ``(sample, [(path, reason), ...])``. The second part lists the images that could not be read; the main
    process counts them over all workers. The first part is None if no readable image was found. It is a CacheError if
    an offline artefact does not fit; the main process raises it.
    """

    def __init__(
        self, records: Records, maker: Maker, seed: int = 0, max_bad: int = 0, entropy: tuple[int, ...] = ()
    ) -> None:
        """
        Args:
            records: Detectron2 records; a list is stored as bytes, which loading processes share.
            maker: callable that maps a record to a sample. For an image that cannot be used it raises DataError or
                returns None.
            seed: of the augmentations.
            max_bad: number of unreadable image files that are replaced; with more an item is None. 0 at evaluation,
                where every image counts. Records of one file count once, as they do in the main process.
            entropy: seeds the random numbers together with ``seed``, so that sources of one seed draw different ones.
        """
        self.records = DatasetFromList(records, copy=False) if isinstance(records, list) else records
        self.maker = maker
        self.seed = seed
        self.max_bad = max_bad
        self.entropy = entropy

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int | tuple[int, int]) -> Item:
        """
        Args:
            index: (draw number, index) in training, index at evaluation.
        """
        draw, place = index if isinstance(index, tuple) else (0, index)
        faults: list[Fault] = []
        for candidate in self._candidates(draw, place):
            with seeded(self.seed, draw, *self.entropy):
                sample = self._made(candidate, faults)
            if sample is not None or len({path for path, _ in faults}) > self.max_bad:
                return sample, faults
        return None, faults

    def _candidates(self, draw: int, index: int) -> Iterator[int]:
        """The index itself, then the others in an order that depends on (seed, draw) and the source."""
        yield index
        others = np.random.default_rng((self.seed, draw, *self.entropy)).permutation(len(self.records))
        yield from (int(other) for other in others if other != index)

    def _made(self, index: int, faults: list[Fault]) -> Sample | CacheError | None:
        record = self.records[index]
        try:
            sample = self.maker(record)
        except CacheError as error:
            return error  # another image would fail too; the main process raises it, with a readable traceback
        except DataError as error:
            faults.append((str(record["file_name"]), str(error)))
            return None
        if sample is None:
            faults.append((str(record["file_name"]), f"the sample maker returned nothing for {record['file_name']}"))
        return sample


def plain_loader(dataset: Dataset, num_workers: int, **arguments: Any) -> WatchedLoader:
    """A loader without collation that leaves the global random generator unchanged for any number of workers."""
    # A DataLoader draws the base seed of its workers from this generator.
    generator = torch.Generator().manual_seed(0)
    return WatchedLoader(dataset, num_workers, collate_fn=_no_collation, generator=generator, **arguments)


def _no_collation(items):
    return items
