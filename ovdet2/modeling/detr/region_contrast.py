"""Regional contrastive distillation of CCKT-Det: queries and the teacher's crops of their objects find each other.

Shapes: B images, N queries, X the most objects of one image, P pairs of a query and an object, M objects of all images,
D embedding dimension. Sums, not means: who calls divides.
"""

import torch


def pair_contrast(student, teacher, query, valid, temperature=0.07):
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


def class_contrast(student, matched, labels, teacher, teacher_labels, active, temperature=0.07):
    """One crop for each class, against the queries of the whole batch: the form of the published code.

    A matched query is to find the crop of its class among those of all classes; the crop of a class, the queries
    matched with that class among all queries.

    Args:
        student: Tensor [B * N, D], unit rows.
        matched: Tensor [P] int64, rows of ``student``.
        labels: Tensor [P] int64, their classes.
        teacher: Tensor [M, D], unit rows of any floating type where ``active``; the target.
        teacher_labels: Tensor [M] int64, their classes.
        active: Tensor [M] bool, at most one of each class: the crops that stand for their class.
        temperature: tau.

    Returns:
        As of :func:`pair_contrast`: the mean of the sum over matched queries and of the sum over classes. Of a class's
        scores the mean over its queries counts. Pairs whose class has no active crop take no part.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = _full_precision(student)
        teacher = teacher.to(student).masked_fill(~active[:, None], 0.0)
        logits = student @ teacher.T / temperature  # BN x M
        rows = logits[matched]  # P x M
        own = (labels[:, None] == teacher_labels) & active
        if not len(teacher_labels):
            return logits.sum()
        to_teacher = rows.masked_fill(~active, -torch.inf).logsumexp(dim=1) - (rows * own).sum(dim=1)
        count = own.sum(dim=0)
        to_student = logits.logsumexp(dim=0) - (rows * own).sum(dim=0) / count.clamp(min=1)
        return (to_teacher.masked_fill(~own.any(dim=1), 0.0).sum() + to_student.masked_fill(count == 0, 0.0).sum()) / 2


def one_of_each_class(labels, candidates, num_classes):
    """A random candidate of each class that has one; drawn from torch's global generator.

    Args:
        labels: Tensor [M] int64, below ``num_classes``.
        candidates: Tensor [M] bool.

    Returns:
        Tensor [M] bool.
    """
    order = 1 + torch.randperm(len(labels)).to(labels.device)  # different for each, so that one is the greatest
    order = order.masked_fill(~candidates, 0)
    greatest = order.new_zeros(num_classes).scatter_reduce(0, labels, order, "amax")
    return candidates & (order == greatest[labels])


def _full_precision(tensor):
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
