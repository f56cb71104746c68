"""InfoNCE in both directions against a float64 reference, and over two processes against one."""

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from torch.nn import functional as F

from ovdet2.engine.launch import launch
from ovdet2.modeling.contrastive import gather_rows, symmetric_info_nce


def reference(logits, ignored=None):
    """Pair by pair in numpy."""
    logits, total = np.asarray(logits, np.float64), 0.0
    for table, mask in ((logits, ignored), (logits.T, None if ignored is None else np.asarray(ignored).T)):
        for i, row in enumerate(table):
            kept = [j for j in range(len(row)) if j == i or mask is None or not mask[i][j]]
            total += np.log(np.exp(row[kept] - row.max()).sum()) + row.max() - row[i]
    return total / (2 * len(logits))


@pytest.mark.parametrize("pairs", [1, 2, 9])
def test_equals_the_reference(pairs):
    generator = torch.Generator().manual_seed(pairs)
    logits = 5 * torch.randn(pairs, pairs, generator=generator, dtype=torch.float64)
    ignored = torch.rand(pairs, pairs, generator=generator) < 0.3
    assert symmetric_info_nce(logits).item() == pytest.approx(reference(logits), abs=1e-12)
    assert symmetric_info_nce(logits, ignored).item() == pytest.approx(reference(logits, ignored), abs=1e-12)
    order = torch.randperm(pairs, generator=generator)
    shuffled = symmetric_info_nce(logits[order][:, order], ignored[order][:, order])
    assert shuffled.item() == pytest.approx(reference(logits, ignored), abs=1e-12)


def test_one_pair_or_none_costs_nothing():
    for pairs in (0, 1):
        logits = torch.full((pairs, pairs), 3.0, requires_grad=True)
        loss = symmetric_info_nce(logits)
        loss.backward()
        assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_all_others_ignored():
    logits = torch.randn(4, 4, requires_grad=True)
    loss = symmetric_info_nce(logits, torch.ones(4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_half_precision_and_wrong_shape():
    assert symmetric_info_nce(torch.randn(3, 3).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        symmetric_info_nce(torch.randn(2, 3))


COUNTS = (3, 1)  # pairs of the two processes


def batch():
    """Made-up inputs of 4 pairs, and the one weight matrix of a model."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (4, 5), (5, 5)))


def loss_of(left, right, weight, scale):
    one, _ = gather_rows(F.normalize(left @ weight, dim=1))
    other, first = gather_rows(F.normalize(right, dim=1))
    return symmetric_info_nce(scale * one @ other.T), first


def in_two_processes(out):
    left, right, weight = batch()
    part = slice(0, COUNTS[0]) if comm.get_rank() == 0 else slice(COUNTS[0], None)
    weight.requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss, first = loss_of(left[part], right[part], weight, scale)
    loss.backward()
    for gradient in (weight.grad, scale.grad):  # as DistributedDataParallel averages them
        torch.distributed.all_reduce(gradient)
        gradient /= comm.get_world_size()
    torch.save((loss.detach(), weight.grad, scale.grad, first), out / f"{comm.get_rank()}.pt")


def test_two_processes_equal_one(tmp_path):
    """The first has more pairs than the second."""
    launch(in_two_processes, 2, args=(tmp_path,), use_cuda=False)
    left, right, weight = batch()
    weight.requires_grad_()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    wanted, _ = loss_of(left, right, weight, scale)
    wanted.backward()
    for rank, expected_first in enumerate((0, COUNTS[0])):
        loss, weight_grad, scale_grad, first = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert first == expected_first
        torch.testing.assert_close(loss, wanted.detach(), atol=1e-12, rtol=0)
        torch.testing.assert_close(weight_grad, weight.grad, atol=1e-12, rtol=0)
        torch.testing.assert_close(scale_grad, scale.grad, atol=1e-12, rtol=0)
