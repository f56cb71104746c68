"""The distillation loss as a pure function; its weight is applied elsewhere.

Shapes: R regions, D embedding dimension.
"""

from torch import Tensor


def embedding_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 distance of region embeddings, summed over dimensions and averaged over regions (ViLD Eq. 3).

    With the sum over D the weight w is the paper's number; implementations that also average over D use w = 256 for
    ViLD's 0.5 at D = 512. For a fixed angle between the embeddings the distance grows with the square root of D.

    Args:
        student: Tensor [R, D], unit rows.
        teacher: Tensor [R, D], unit rows, any floating type, any device; no gradient.

    Returns:
        Scalar Tensor, float32 (float64 if ``student`` is): mean_R sum_D |e - v|, between 0 and 2 sqrt(D); 0 without
        regions.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"shapes differ: student embeddings {list(student.shape)}, teacher {list(teacher.shape)}")
    if student.dtype.itemsize < 4:
        student = student.float()
    distances = (student - teacher.to(student)).abs().sum(dim=1)
    return distances.mean() if len(distances) else distances.sum()
