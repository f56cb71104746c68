"""The words present in an image that no prior file has: predicted by CLIP on the fly, or given by the user.

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
        vocabulary: of the K words.
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
            teacher: that embedded the words, too.
            vocabulary: of K words.
            threshold, top, fill, seed: of :class:`~ovdet2.methods.cckt.prior_words.PriorWords`.
            tiles: n; CLIP scores the image and n x n cells of it, the best score counts.

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
            Tensor [at most K] int64, best first. The same pixels give the same words.
        """
        image = np.array(image)  # a copy, which torch may share
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
    """The indices of words that the user gives as present in an image.

    Args:
        words: best first.
        names: K words of the vocabulary.

    Returns:
        Tensor [len(words)] int64.

    Raises:
        UsageError: a word is not in the vocabulary, or twice.
    """
    index = columns_of(words, names) if words else torch.zeros(0, dtype=torch.int64)
    unknown = [word for word, position in zip(words, index.tolist()) if position < 0]
    if unknown or len(index.unique()) < len(index):
        raise UsageError(
            f"the present words {', '.join(words)} must be words of the vocabulary, each once; it does not have "
            f"{', '.join(unknown) or 'one of them twice'}: leave those out, or add them to the vocabulary."
        )
    return index
