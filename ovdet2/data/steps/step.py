"""The protocol of the steps that make a sample."""

from __future__ import annotations

from ovdet2.data.samples import Sample
from ovdet2.vlm.fingerprint import Fingerprint


class Step:
    """A step changes a sample in place. It must be picklable, since it runs in data loading workers.

    Random numbers come from numpy's (or torch's) global generator, which the loader seeds for every draw.
    """

    def __call__(self, sample: Sample) -> None:
        """
        Args:
            sample: as the previous steps have set it.

        Raises:
            DataError: the image cannot be used; in training another image replaces it.
            CacheError: an offline artefact does not fit the image; the run stops.
        """
        raise NotImplementedError

    def require_teacher(self, teacher: Fingerprint, owner: str) -> None:
        """Refuse a detector whose teacher is not the teacher of the embeddings that this step attaches.

        Args:
            teacher: of the detector's vocabulary.
            owner: name of the detector in messages.

        Raises:
            CacheError: names both teachers.
        """
