"""Loaders whose position is a number, so that a resumed run sees exactly the images it would have seen.

Every training sample is a *draw*: the t-th index of one endless stream shared by all processes. Process r of W takes
the draws r, r + W, r + 2W, ... . Batches are formed from indices alone, before any image is decoded, so skipping to a
position costs nothing, and the augmentations of a draw are seeded by (seed, t): neither the number of workers nor an
interruption changes them.
"""

import contextlib
import itertools
import logging
import random

import numpy as np
import torch
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from ovdet2.data.mapper import OpenVocabularyMapper
from ovdet2.data.records import load_records, require_one_base
from ovdet2.errors import CacheError, DataError, UsageError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def seeded(*entropy):
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
    """Records under a mapper; in training, an unreadable image is replaced by another one.

    An item is ``(mapped record or None, [(path, reason), ...])``: the second part lists the images that could not be
    read. It travels to the main process, which counts them over all workers. None: no readable image was found.
    """

    def __init__(self, records, mapper, seed=0, max_bad=0):
        """
        Args:
            records: list of Detectron2 records.
            mapper: callable of a record; raises DataError for an image that cannot be used, or returns None to pass.
            seed: of the augmentations.
            max_bad: unreadable images after which one item gives up; 0 at evaluation, where every image counts.
        """
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper
        self.seed = seed
        self.max_bad = max_bad

    def __len__(self):
        return len(self.records)

    def __getitem__(self, key):
        """
        Args:
            key: (draw number, index) in training, index at evaluation.
        """
        draw, index = key if isinstance(key, tuple) else (0, key)
        faults = []
        for candidate in self._candidates(draw, index):
            with seeded(self.seed, draw):
                mapped = self._map(candidate, faults)
            if mapped is not None or len(faults) > self.max_bad:
                return mapped, faults
        return None, faults

    def _candidates(self, draw, index):
        """The index itself, then the others in an order that depends on (seed, draw) alone."""
        yield index
        others = np.random.default_rng((self.seed, draw)).permutation(len(self.records))
        yield from (int(other) for other in others if other != index)

    def _map(self, index, faults):
        record = self.records[index]
        try:
            mapped = self.mapper(record)
        except CacheError as error:
            return error  # no other image would fare better; raised in the main process, where it is readable
        except DataError as error:
            faults.append((str(record["file_name"]), str(error)))
            return None
        if mapped is None:
            faults.append((str(record["file_name"]), f"the mapper returned nothing for {record['file_name']}"))
        return mapped


class TrainingBatches:
    """Endless batches of (draw, index) of this process, each of one orientation when orientations are given."""

    def __init__(self, sampler, batch_size, wide=None, first_draw=0, skip=0):
        """
        Args:
            sampler: yields this process's indices, endlessly: draws rank, rank + W, rank + 2W, ... of the stream.
            batch_size: images of one process.
            wide: list of bool per record, width above height; None: batches in drawn order.
            first_draw: draws below it are left out.
            skip: batches left out after that.
        """
        self.sampler = sampler
        self.batch_size = batch_size
        self.wide = wide
        self.first_draw = first_draw
        self.skip = skip

    def __iter__(self):
        return itertools.islice(self._all(), self.skip, None)

    def _all(self):
        draws = zip(itertools.count(comm.get_rank(), comm.get_world_size()), self.sampler)
        waiting = {False: [], True: []}
        for draw, index in draws:
            if draw < self.first_draw:
                continue
            group = waiting[self.wide is not None and self.wide[index]]
            group.append((draw, index))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


class TrainLoader:
    """Endless iterable of batches (lists of mapped records) with a position that is saved and restored."""

    def __init__(self, dataset, make_sampler, images_per_batch, *, wide=None, seed=0, num_workers=0):
        """
        Args:
            dataset: :class:`MappedRecords`; its ``max_bad`` is the number of unreadable images tolerated in the run.
            make_sampler: function of a seed returning the index sampler of this process.
            images_per_batch: images of one step over all processes.
            wide: see :class:`TrainingBatches`.
            seed: of order and augmentations, the same in every process.
            num_workers: loading processes of this process.

        Raises:
            UsageError: the images of a step cannot be divided among the processes.
        """
        world_size = comm.get_world_size()
        if images_per_batch < 1 or images_per_batch % world_size:
            raise UsageError(
                f"SOLVER.IMS_PER_BATCH is {images_per_batch}, the total over all processes: "
                f"make it a positive multiple of their number, {world_size}."
            )
        self.dataset = dataset
        self.make_sampler = make_sampler
        self.images_per_batch = images_per_batch
        self.wide = wide
        self.seed = seed
        self.num_workers = num_workers
        self.first_draw = 0
        self.consumed = 0
        self.bad_images = {}

    def __iter__(self):
        self.dataset.seed = self.seed
        batches = TrainingBatches(
            self.make_sampler(self.seed),
            self.images_per_batch // comm.get_world_size(),
            self.wide,
            self.first_draw,
            self.consumed,
        )
        loader = _plain_loader(self.dataset, self.num_workers, batch_sampler=batches)
        for items in loader:
            for record, faults in items:
                if isinstance(record, CacheError):
                    raise record
                self._count(faults)
            self.consumed += 1
            yield [record for record, _ in items]

    def _count(self, faults):
        """Log each unreadable image once.

        Raises:
            DataError: more of them than tolerated.
        """
        for path, reason in faults:
            if path not in self.bad_images:
                self.bad_images[path] = reason
                logger.warning("Skipped training image %d: %s", len(self.bad_images), reason)
        total, limit = len(self.dataset), self.dataset.max_bad
        if len(self.bad_images) > limit or len(self.bad_images) == total:
            listing = "\n  ".join(self.bad_images.values())
            raise DataError(
                f"{len(self.bad_images)} of {total} training images cannot be used, DATALOADER.MAX_BAD_IMAGES is "
                f"{limit}:\n  {listing}\nMend or remove them, or raise DATALOADER.MAX_BAD_IMAGES."
            )

    def state_dict(self):
        """The position, and the unreadable images of each process; a collective call, whole on rank 0."""
        return {
            "seed": self.seed,
            "first_draw": self.first_draw,
            "consumed": self.consumed,
            "world_size": comm.get_world_size(),
            "images_per_batch": self.images_per_batch,
            "images": len(self.dataset),
            "bad_images": comm.gather(self.bad_images),
        }

    def load_state_dict(self, state):
        """Continue at a saved position.

        With another number of processes or images per step the stream goes on after the images already seen; those
        that waited for a partner of their orientation (below one batch per orientation and process) may come again.
        The unreadable images of the saved run go on counting: a resumed run is not granted new ones.
        """
        self.seed = state["seed"]
        if state["images"] != len(self.dataset):
            logger.warning(
                "The training set has %d images, the saved run had %d: the order of images starts anew.",
                len(self.dataset),
                state["images"],
            )
            return
        self.bad_images = self._saved_bad_images(state)
        same = state["world_size"] == comm.get_world_size() and state["images_per_batch"] == self.images_per_batch
        if same:
            self.first_draw, self.consumed = state["first_draw"], state["consumed"]
            return
        logger.warning(
            "The saved run had %d processes and %d images per step, this one has %d and %d: it goes on, but is not "
            "the same as an uninterrupted run.",
            state["world_size"],
            state["images_per_batch"],
            comm.get_world_size(),
            self.images_per_batch,
        )
        self.first_draw = state["first_draw"] + state["consumed"] * state["images_per_batch"]
        self.consumed = 0

    @staticmethod
    def _saved_bad_images(state):
        """Those this process counted itself; with another number of processes, those of all."""
        saved = state.get("bad_images", [])  # checkpoints of earlier versions have none
        if len(saved) == comm.get_world_size():
            return dict(saved[comm.get_rank()])
        return {path: reason for counted in saved for path, reason in counted.items()}


class TestLoader:
    """One image per batch, each on exactly one process; an unreadable image is an error, for it changes the metric."""

    __test__ = False  # the name is no test case for pytest

    def __init__(self, dataset, num_workers=0):
        self.dataset = dataset
        self._loader = _plain_loader(dataset, num_workers, batch_size=1, sampler=InferenceSampler(len(dataset)))

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        for ((record, faults),) in self._loader:
            if isinstance(record, CacheError):
                raise record
            if record is None:
                raise DataError(f"{faults[0][1]} An evaluation image cannot be skipped: the metric would change.")
            yield [record]


def build_train_loader(cfg, mapper=None):
    """The training loader of a configuration (DATASETS.TRAIN, DATALOADER.*, SOLVER.IMS_PER_BATCH, SEED).

    Args:
        mapper: callable of a record; :class:`OpenVocabularyMapper` when None.

    Raises:
        UsageError, DataError: see :func:`load_records`, :func:`require_one_base` and :class:`TrainLoader`.
    """
    filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records = load_records(cfg.DATASETS.TRAIN, "DATASETS.TRAIN", filter_empty, base_only=True)
    require_one_base(cfg)
    # A negative seed asks for a random one, drawn once and saved with the position.
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    mapper = OpenVocabularyMapper(cfg, True) if mapper is None else mapper
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING and all("width" in r and "height" in r for r in records):
        wide = [record["width"] > record["height"] for record in records]
    return TrainLoader(
        MappedRecords(records, mapper, seed, cfg.DATALOADER.MAX_BAD_IMAGES),
        _sampler_factory(cfg, records),
        cfg.SOLVER.IMS_PER_BATCH,
        wide=wide,
        seed=seed,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def build_test_loader(cfg, dataset_name, mapper=None):
    """The loader of one evaluation set; every record is kept, those without annotations too."""
    records = load_records([dataset_name], "DATASETS.TEST", filter_empty=False)
    mapper = OpenVocabularyMapper(cfg, False) if mapper is None else mapper
    return TestLoader(MappedRecords(records, mapper), cfg.DATALOADER.NUM_WORKERS)


def _sampler_factory(cfg, records):
    name, count = cfg.DATALOADER.SAMPLER_TRAIN, len(records)  # the list itself must not live on in the function
    if name == "TrainingSampler":
        return lambda seed: TrainingSampler(count, seed=seed)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    raise UsageError(f"DATALOADER.SAMPLER_TRAIN is {name!r}: use 'TrainingSampler' or 'RepeatFactorTrainingSampler'.")


def _plain_loader(dataset, num_workers, **arguments):
    """A DataLoader without collation, which draws its worker seed from a generator of its own: the global one stays
    untouched, whatever the number of workers."""
    generator = torch.Generator().manual_seed(0)
    return DataLoader(dataset, num_workers=num_workers, collate_fn=_no_collation, generator=generator, **arguments)


def _no_collation(items):
    return items
