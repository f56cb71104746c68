"""Regional contrastive distillation of CCKT-Det: contrastive losses between query and crop embeddings.

Shapes: B images, N queries, X the most objects of one image, P pairs of a query and an object, K classes, m crops of a
class, D embedding dimension. The losses are sums over pairs; the caller normalises them.
"""

import torch
from torch import Tensor, nn

from ovdet2.errors import UsageError


def pair_contrast(student: Tensor, teacher: Tensor, query: Tensor, valid: Tensor, temperature: float = 0.07) -> Tensor:
    """InfoNCE of each crop with all queries of its image, and of each matched query with all crops of its image (Eqs. 5
    and 6), averaged over the two directions and summed over pairs.

    Args:
        student: Tensor [B, N, D], query embeddings, unit rows.
        teacher: Tensor [B, X, D], crop embeddings, unit rows where ``valid``, any floating type; no gradient.
        query: Tensor [B, X] int64, the query matched with each object; ignored where not ``valid``.
        valid: Tensor [B, X] bool, objects with a query and a crop; others are neither positives nor negatives.
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
        objects = objects.masked_fill(
            ~valid[:, None] & ~itself, -torch.inf
        )  # keeps the diagonal: a row of only -inf gives NaN
        to_teacher = objects.logsumexp(dim=2) - own
        return ((to_student + to_teacher) / 2).masked_fill(~valid, 0.0).sum()


def class_contrast(
    student: Tensor, matched: Tensor, labels: Tensor, teacher: Tensor, active: Tensor, temperature: float = 0.07
) -> Tensor:
    """InfoNCE between one crop per class and all queries of the batch, as in the published code.

    For a matched query, the positive is the crop of its class, the negatives are those of other classes. For the crop
    of a class, the positives are the queries matched with that class, the negatives are all other queries.

    Args:
        student: Tensor [B * N, D], unit rows.
        matched: Tensor [P] int64, rows of ``student`` that are matched with an object.
        labels: Tensor [P] int64, classes of the matched queries.
        teacher: Tensor [K, D], unit rows where ``active``, any floating type; no gradient.
        active: Tensor [K] bool, classes that have a crop.
        temperature: tau.

    Returns:
        As of :func:`pair_contrast`: the mean of the sum over matched queries and the sum over classes. The term of a
        class is the mean over its queries. Pairs whose class has no crop are ignored.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = _full_precision(student)
        teacher = teacher.to(student).masked_fill(~active[:, None], 0.0)
        logits = student @ teacher.T / temperature  # BN x K
        rows = logits[matched]  # P x K
        paired = active[labels]
        own = rows.gather(1, labels[:, None])[:, 0].masked_fill(~paired, 0.0)
        # A class without a crop is no negative. Ignored rows are not masked: a row of only -inf has a NaN gradient.
        to_teacher = rows.masked_fill(~active & paired[:, None], -torch.inf).logsumexp(dim=1) - own
        zeros = own.new_zeros(len(active))
        count = zeros.scatter_add(0, labels, paired.to(own))
        to_student = logits.logsumexp(dim=0) - zeros.scatter_add(0, labels, own) / count.clamp(min=1)
        return (to_teacher.masked_fill(~paired, 0.0).sum() + to_student.masked_fill(count == 0, 0.0).sum()) / 2


class ClassCrops(nn.Module):
    """Crop embeddings of each class, from which one per class is drawn. They are not saved in checkpoints, since the
    cache has them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("crops", torch.zeros(0, 1, 0, dtype=torch.float16), persistent=False)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64), persistent=False)

    def fill(self, crops: Tensor, counts: Tensor) -> None:
        """
        Args:
            crops: Tensor [K, m, D], of any floating type.
            counts: Tensor [K] int64, number of valid rows of each class.
        """
        self.crops, self.counts = crops.to(self.crops.device), counts.to(self.counts.device)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw a crop of each class, by torch's global CPU generator: (Tensor [K, D], Tensor [K] bool, whether the
        class has a crop).

        Raises:
            UsageError: the crops are not read yet.
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
