"""The protocol of the steps that make a sample."""

from __future__ import annotations

from ovdet2.data.samples import Sample
from ovdet2.vlm.fingerprint import Fingerprint


class Step:
    """Changes a sample in place; picklable, since it runs in the processes that load data.

    Random numbers come from numpy's (or torch's) global generator, which the loader seeds for every draw.
    """

    def __call__(self, sample: Sample) -> None:
        """
        Args:
            sample: as the steps before have left it.

        Raises:
            DataError: the image cannot be used; another one takes its place in training.
            CacheError: an offline artefact does not fit; the run stops.
        """
        raise NotImplementedError

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Refuse a detector whose embedding space is another than that of what the step attaches.

        Args:
            teacher: of the detector's vocabulary.
            owner: what messages call it.

        Raises:
            CacheError: names both teachers.
        """
