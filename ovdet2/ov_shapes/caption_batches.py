"""Which captioned images make up the batches of a teacher's training."""

from collections.abc import Sequence

import numpy as np

from ovdet2.errors import UsageError


class BatchPlan:
    """Which pairs make up the batch of each step, as a pure function of the step.

    No batch holds one caption text twice: ClipLoss uses every other text of the batch as a negative of an image, and
    an equal text would be a false negative. A repeated text waits for a later batch of its epoch.
    """

    def __init__(self, captions: Sequence[str], batch_size: int, seed: int) -> None:
        if len(captions) < batch_size:
            raise UsageError(
                f"{len(captions)} pairs do not fill a batch of {batch_size}: raise --pairs or lower --batch."
            )
        self._captions, self._batch_size, self._seed = captions, batch_size, seed
        self._epoch: int | None = None
        self._batches: list[list[int]] = []
        self._per_epoch = len(captions) // batch_size

    def batch(self, step: int) -> list[int]:
        """Integer indices of the pairs of ``step``; at most the batch size of them."""
        epoch, position = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._captions))
            self._epoch, self._batches = epoch, self._fill(order)
        return self._batches[position]

    def _fill(self, order):
        batches, texts = [[] for _ in range(self._per_epoch)], [set() for _ in range(self._per_epoch)]
        first_open = 0
        for index in order:
            text = self._captions[index]
            for i in range(first_open, self._per_epoch):
                if len(batches[i]) < self._batch_size and text not in texts[i]:
                    batches[i].append(int(index))
                    texts[i].add(text)
                    break
            while first_open < self._per_epoch and len(batches[first_open]) == self._batch_size:
                first_open += 1
        return batches
