"""The stream of batches of one source, resumable: its position is a number.

Every training sample is a *draw*: the t-th index of one endless stream shared by all processes. Process r of W takes
the draws r, r + W, r + 2W, ... . Batches are formed from indices, before any image is decoded, so skipping to a
position costs nothing. The augmentations of a draw are seeded by (seed, t), so neither the number of workers nor an
interruption changes them. A resumed run sees the images that an uninterrupted run sees.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.utils import comm

from ovdet2.data.mapped_records import MappedRecords, plain_loader
from ovdet2.errors import CacheError, DataError, UsageError

logger = logging.getLogger(__name__)

SamplerFactory = Callable[[int], Iterable[int]]
BATCH_KEY = "SOLVER.IMS_PER_BATCH"


class TrainingBatches:
    """Endless batches of (draw, index) of this process, each of one orientation when orientations are given."""

    def __init__(
        self,
        sampler: Iterable[int],
        batch_size: int,
        wide: Sequence[bool] | None = None,
        first_draw: int = 0,
        skip: int = 0,
    ) -> None:
        """
        Args:
            sampler: yields this process's indices, endlessly: draws rank, rank + W, rank + 2W, ... of the stream.
            batch_size: images of one process.
            wide: for each record whether it is wider than high; None: batches in drawn order.
            first_draw: earlier draws are skipped.
            skip: number of batches that are skipped after that.
        """
        self.sampler = sampler
        self.batch_size = batch_size
        self.wide = wide
        self.first_draw = first_draw
        self.skip = skip

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
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


class SourceStream:
    """Endless iterable of the batches of one source (lists of samples), with a position that is saved and restored."""

    def __init__(
        self,
        dataset: MappedRecords,
        make_sampler: SamplerFactory,
        images_per_step: int,
        *,
        wide: Sequence[bool] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        key: str = BATCH_KEY,
    ) -> None:
        """
        Args:
            dataset: its ``max_bad`` is the number of unreadable images tolerated in the run.
            make_sampler: function of a seed returning the index sampler of this process.
            images_per_step: over all processes.
            wide: see :class:`TrainingBatches`.
            seed: of order and augmentations, the same in every process.
            num_workers: loading processes of this process.
            key: configuration key of the number of images, for messages.

        Raises:
            UsageError: the images of a step cannot be divided among the processes.
        """
        world_size = comm.get_world_size()
        if images_per_step < 1 or images_per_step % world_size:
            raise UsageError(
                f"{key} is {images_per_step}, the total over all processes: make it a positive multiple of their "
                f"number, {world_size}."
            )
        self.dataset = dataset
        self.make_sampler = make_sampler
        self.images_per_step = images_per_step
        self.wide = wide
        self.seed = seed
        self.num_workers = num_workers
        self.first_draw = 0
        self.consumed = 0
        self.bad_images: dict[str, str] = {}

    def __iter__(self) -> Iterator[list[Any]]:
        self.dataset.seed = self.seed
        batches = TrainingBatches(
            self.make_sampler(self._sampler_seed()),
            self.images_per_step // comm.get_world_size(),
            self.wide,
            self.first_draw,
            self.consumed,
        )
        for items in plain_loader(self.dataset, self.num_workers, batch_sampler=batches):
            for sample, faults in items:
                if isinstance(sample, CacheError):
                    raise sample
                self._count(faults)
                if sample is None:
                    raise self._too_many_bad()
            self.consumed += 1
            yield [sample for sample, _ in items]

    def _sampler_seed(self):
        """The seed of the sampler: for the first source the seed itself, for others mixed with their entropy."""
        entropy = self.dataset.entropy
        return int(np.random.SeedSequence((self.seed, *entropy)).generate_state(1)[0]) if entropy else self.seed

    def _count(self, faults):
        """Log each unreadable image once.

        Raises:
            DataError: there are more than tolerated.
        """
        for path, reason in faults:
            if path not in self.bad_images:
                self.bad_images[path] = reason
                logger.warning("Skipped training image %d: %s", len(self.bad_images), reason)
        if len(self.bad_images) > self.dataset.max_bad or len(self.bad_images) == len(self.dataset):
            raise self._too_many_bad()

    def _too_many_bad(self):
        listing = "\n  ".join(self.bad_images.values())
        return DataError(
            f"{len(self.bad_images)} of {len(self.dataset)} training images cannot be used, DATALOADER.MAX_BAD_IMAGES is "
            f"{self.dataset.max_bad}:\n  {listing}\nRepair or remove them, or raise DATALOADER.MAX_BAD_IMAGES."
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, and the unreadable images of each process; a collective call, complete on rank 0."""
        return {
            "seed": self.seed,
            "first_draw": self.first_draw,
            "consumed": self.consumed,
            "world_size": comm.get_world_size(),
            "images_per_batch": self.images_per_step,
            "images": len(self.dataset),
            "bad_images": comm.gather(self.bad_images),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position.

        With another number of processes or images per step the stream continues after the images already seen. Images
        that waited for a batch of their orientation (fewer than a batch per orientation and process) may come again.
        The unreadable images of the saved run still count towards the limit.
        """
        self.seed = state["seed"]
        if state["images"] != len(self.dataset):
            logger.warning(
                "The training set has %d images, the saved run had %d: the order of images is restarted.",
                len(self.dataset),
                state["images"],
            )
            return
        self.bad_images = self._saved_bad_images(state)
        same = state["world_size"] == comm.get_world_size() and state["images_per_batch"] == self.images_per_step
        if same:
            self.first_draw, self.consumed = state["first_draw"], state["consumed"]
            return
        logger.warning(
            "The saved run had %d processes and %d images per step, this one has %d and %d: it continues, but is not "
            "the same as an uninterrupted run.",
            state["world_size"],
            state["images_per_batch"],
            comm.get_world_size(),
            self.images_per_step,
        )
        self.first_draw = state["first_draw"] + state["consumed"] * state["images_per_batch"]
        self.consumed = 0

    @staticmethod
    def _saved_bad_images(state):
        """The saved images of this process; with another number of processes, the images of all processes."""
        saved = state.get("bad_images", [])  # checkpoints of earlier versions have none
        if len(saved) == comm.get_world_size():
            return dict(saved[comm.get_rank()])
        return {path: reason for counted in saved for path, reason in counted.items()}
