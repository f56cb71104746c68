"""The distillation loss as a pure function; its weight belongs to the configuration.

Shapes: R regions, D embedding dimension.
"""

from torch import Tensor


def embedding_l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Distance of region embeddings, summed over dimensions and averaged over regions (ViLD Eq. 3).

    With the sum over D the weight w is the paper's number; implementations that average over D as well write ViLD's
    w = 0.5 at D = 512 as 256. At one angle between the embeddings the distance grows with the square root of D.

    Args:
        student: Tensor [R, D], unit rows.
        teacher: Tensor [R, D], unit rows of any floating type, on any device; the target.

    Returns:
        Scalar Tensor, float32 (float64 if ``student`` is): mean_R sum_D |e - v|, between 0 and 2 sqrt(D); 0 without
        regions.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student embeddings {list(student.shape)}, teacher embeddings {list(teacher.shape)}")
    if student.dtype.itemsize < 4:
        student = student.float()
    distances = (student - teacher.to(student)).abs().sum(dim=1)
    return distances.mean() if len(distances) else distances.sum()
