"""Semantic priors of images without a prior file: present words predicted by CLIP on the fly, or user-provided.

Shapes: K words of the vocabulary.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ovdet2.errors import UsageError
from ovdet2.methods.cckt.prior_words import WordOrder, ordered_words
from ovdet2.priors.clip import RESIZE, ClipBackend, view_boxes
from ovdet2.priors.concept_prior import best, columns_of
from ovdet2.vlm.crops import crop_regions
from ovdet2.vlm.fingerprint import require_same_teacher
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary


class OnlinePriors:
    """Predicts the present words of an image by CLIP, as ``ovdet2 prior --backend clip`` does for a
    data set.

    Attributes:
        vocabulary: vocabulary of K words.
    """

    def __init__(
        self,
        teacher: Teacher,
        vocabulary: Vocabulary,
        threshold: float = 0.7,
        top: int | None = 6,
        fill: str = "none",
        tiles: int = 1,
        seed: int = 0,
    ) -> None:
        """
        Args:
            teacher: teacher that also embedded the words.
            vocabulary: vocabulary of K words.
            threshold, top, fill, seed: see :class:`~ovdet2.methods.cckt.prior_words.PriorWords`.
            tiles: n; a word's score is its best one over the image and n x n cells of the image.

        Raises:
            DataError: the vocabulary is of another teacher.
        """
        require_same_teacher(teacher.fingerprint, "MODEL.TEACHER", vocabulary.teacher, "the vocabulary")
        self.vocabulary = vocabulary
        self.clip = ClipBackend(teacher, vocabulary, tiles)
        self.threshold, self.top, self.fill = threshold, top, fill
        self.order = WordOrder(vocabulary.names, seed)

    def __call__(self, image: np.ndarray) -> Tensor:
        """
        Args:
            image: array [H, W, 3] uint8 RGB.

        Returns:
            Tensor [at most K] int64, best first; deterministic for the same pixels.
        """
        image = np.array(image)  # a copy: torch shares its memory
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        teacher, boxes = self.clip.teacher, view_boxes(image.shape[0], image.shape[1], self.clip.tiles)
        views = crop_regions(pixels, boxes, teacher.image_size, RESIZE[self.clip.resize], teacher.interpolation)
        [score] = self.clip.score(views[None])
        index, score = best(torch.arange(len(score)), score, len(score))
        kept = score >= self.threshold
        return ordered_words(
            index[kept].long(), score[kept], self.order.keys(zlib.crc32(image.data)), self.top, self.fill
        )


def word_indices(words: Sequence[str], names: Sequence[str]) -> Tensor:
    """Vocabulary indices of user-provided present words.

    Args:
        words: present words, best first.
        names: the K words of the vocabulary.

    Returns:
        Tensor [len(words)] int64.

    Raises:
        UsageError: a word is not in the vocabulary, or is given twice.
    """
    index = columns_of(words, names) if words else torch.zeros(0, dtype=torch.int64)
    unknown = [word for word, position in zip(words, index.tolist()) if position < 0]
    if unknown or len(index.unique()) < len(index):
        raise UsageError(
            f"the present words {', '.join(words)} must be words of the vocabulary, each once; invalid: "
            f"{', '.join(unknown) or 'a repeated word'}. Remove these, or add them to the vocabulary."
        )
    return index
