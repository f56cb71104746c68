"""What CCKT-Det adds to a sample: the words present in the image, and the teacher's crops of its objects.

Shapes: P present words, M objects, D embedding dimension.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PresentWords:
    """Words that are present in an image, the semantic priors of its queries.

    Attributes:
        words: Tensor [P] int64 on the CPU: indices of base words in training, of the whole vocabulary at test; the
            first count most where there are more than queries.
    """

    words: Tensor


@dataclass(frozen=True)
class ObjectCrops:
    """The teacher's embeddings of the crops of the M instances.

    Attributes:
        embeddings: Tensor [M, D] float16, unit rows where ``embedded``, zero elsewhere.
        embedded: Tensor [M] bool.
    """

    embeddings: Tensor
    embedded: Tensor
