"""A shuffle buffer for samples in shards: shuffles them, but reads each file nearly from front to back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from detectron2.utils import comm


class ShuffleBuffer:
    """Endless sampler of the indices of this process: shards in random order, samples shuffled by a buffer.

    The buffer holds indices only. The order is a function of seed and epoch.
    """

    def __init__(self, shard: np.ndarray, size: int, seed: int) -> None:
        """
        Args:
            shard: array [N], ascending, the shard of each sample.
            size: of the buffer, at least 1.
            seed: int, the same in every process.
        """
        self.starts = np.searchsorted(shard, np.arange(shard[-1] + 2))
        self.size, self.seed = size, seed

    def __iter__(self) -> Iterator[int]:
        draws = itertools.chain.from_iterable(map(self._epoch, itertools.count()))
        return itertools.islice(draws, comm.get_rank(), None, comm.get_world_size())

    def _epoch(self, epoch):
        random = np.random.default_rng((self.seed, epoch))
        buffer = []
        for number in random.permutation(len(self.starts) - 1):
            for index in range(self.starts[number], self.starts[number + 1]):
                if len(buffer) < self.size:
                    buffer.append(index)
                    continue
                slot = random.integers(self.size)
                yield int(buffer[slot])
                buffer[slot] = index
        yield from (int(buffer[slot]) for slot in random.permutation(len(buffer)))
