"""Regional contrastive distillation of CCKT-Det: queries and the teacher's crops of their objects find each other.

Shapes: B images, N queries, X the most objects of one image, P pairs of a query and an object, K classes, m crops of a
class, D embedding dimension. Sums, not means: who calls divides.
"""

import torch
from torch import Tensor, nn

from ovdet2.errors import UsageError


def pair_contrast(student: Tensor, teacher: Tensor, query: Tensor, valid: Tensor, temperature: float = 0.07) -> Tensor:
    """Each crop against all queries of its image, and each matched query against all crops of its image (Eqs. 5 and 6),
    averaged over the two directions and summed over pairs.

    Args:
        student: Tensor [B, N, D], unit rows.
        teacher: Tensor [B, X, D], unit rows of any floating type where ``valid``; the target.
        query: Tensor [B, X] int64, the query matched with each object; any value where not ``valid``.
        valid: Tensor [B, X] bool, objects with a query and a crop; the others take no part, not even as negatives.
        temperature: tau.

    Returns:
        Scalar Tensor, float32 (float64 if ``student`` is); 0 without pairs, still connected to ``student``.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = _full_precision(student)
        teacher = teacher.to(student).masked_fill(~valid[..., None], 0.0)
        query = query.masked_fill(~valid, 0)
        logits = teacher @ student.transpose(1, 2) / temperature  # B x X x N
        own = logits.gather(2, query[..., None])[..., 0]
        to_student = logits.logsumexp(dim=2) - own
        # Row i: the query of object i; column j: the crop of object j.
        objects = logits.gather(2, query[:, None].expand(-1, query.shape[1], -1)).transpose(1, 2)
        itself = torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
        objects = objects.masked_fill(~valid[:, None] & ~itself, -torch.inf)  # a row of nothing but it gives NaN
        to_teacher = objects.logsumexp(dim=2) - own
        return ((to_student + to_teacher) / 2).masked_fill(~valid, 0.0).sum()


def class_contrast(
    student: Tensor, matched: Tensor, labels: Tensor, teacher: Tensor, active: Tensor, temperature: float = 0.07
) -> Tensor:
    """One crop for each class, against the queries of the whole batch: the form of the published code.

    A matched query is to find the crop of its class among those of all classes; the crop of a class, the queries
    matched with that class among all queries.

    Args:
        student: Tensor [B * N, D], unit rows.
        matched: Tensor [P] int64, rows of ``student``.
        labels: Tensor [P] int64, their classes.
        teacher: Tensor [K, D], a unit row of any floating type for each class that is ``active``; the target.
        active: Tensor [K] bool, classes that have a crop.
        temperature: tau.

    Returns:
        As of :func:`pair_contrast`: the mean of the sum over matched queries and of the sum over classes. Of a class's
        scores the mean over its queries counts. Pairs whose class has no crop take no part.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = _full_precision(student)
        teacher = teacher.to(student).masked_fill(~active[:, None], 0.0)
        logits = student @ teacher.T / temperature  # BN x K
        rows = logits[matched]  # P x K
        paired = active[labels]
        own = rows.gather(1, labels[:, None])[:, 0].masked_fill(~paired, 0.0)
        # A class without a crop is no negative. Rows that take no part stay whole: one of nothing but -inf has a NaN
        # gradient.
        to_teacher = rows.masked_fill(~active & paired[:, None], -torch.inf).logsumexp(dim=1) - own
        zeros = own.new_zeros(len(active))
        count = zeros.scatter_add(0, labels, paired.to(own))
        to_student = logits.logsumexp(dim=0) - zeros.scatter_add(0, labels, own) / count.clamp(min=1)
        return (to_teacher.masked_fill(~paired, 0.0).sum() + to_student.masked_fill(count == 0, 0.0).sum()) / 2


class ClassCrops(nn.Module):
    """A few of the teacher's crops for each class, of which one at a time is drawn. Of no checkpoint: the cache has
    them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("crops", torch.zeros(0, 1, 0, dtype=torch.float16), persistent=False)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64), persistent=False)

    def fill(self, crops: Tensor, counts: Tensor) -> None:
        """
        Args:
            crops: Tensor [K, m, D], of any floating type.
            counts: Tensor [K] int64, how many of the m rows of a class are crops.
        """
        self.crops, self.counts = crops.to(self.crops.device), counts.to(self.counts.device)

    def draw(self) -> tuple[Tensor, Tensor]:
        """A crop of each class: (Tensor [K, D], Tensor [K] bool, whether the class has one), by torch's global
        generator of the CPU.

        Raises:
            UsageError: there are none.
        """
        if not len(self.counts):
            raise UsageError(
                'MODEL.CCKT.CONTRAST "class" has no crops of classes yet: train with ovdet2\'s Trainer, or call '
                "ovdet2.modeling.part.prepare_training with the detector and its training sources."
            )
        place = (torch.rand(len(self.counts)).to(self.counts.device) * self.counts).long()
        return self.crops[torch.arange(len(place), device=place.device), place], self.counts > 0


def _full_precision(tensor):
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
