"""AlignNet: pooled features and the loss against references written object by object in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from torch.nn import functional as F

from ovdet2.engine.launch import launch
from ovdet2.errors import UsageError
from ovdet2.methods.clip_detr.align_net import AlignNet, near_duplicates, pooled_objects
from ovdet2.methods.clip_detr.object_attributes import ObjectAttributes
from ovdet2.modeling.detr.memory import Memory
from ovdet2.modeling.detr.targets import Targets
from ovdet2.vocabulary.bank import WordBank
from tests import detr_cases, micro
from tests.detr_cases import CHANNELS, SHAPES, SIZES, STRIDES, VALID, memory


def targets_of(counts, words=5):
    """As of :mod:`tests.detr_cases`, of images of these sizes."""
    return replace(detr_cases.targets(counts, words), image_sizes=SIZES[: len(counts)])


def reference_pooled(memory, targets, size):
    """The mean of bilinear samples on a regular grid within the box, cell centres at half integers."""
    pooled, image = [], np.repeat(np.arange(len(targets.counts)), targets.counts)
    for box, number in zip(targets.boxes_cxcywh.double().numpy(), image):
        per_level = []
        for level, features in enumerate(memory.levels()):
            height, width = (side / STRIDES[level] for side in SIZES[number])
            rows, columns = VALID[number][level]
            values = features[number, :, :rows, :columns].numpy()
            steps = (np.arange(2 * size) + 0.5) / (2 * size)
            xs = np.clip((box[0] + (steps - 0.5) * box[2]) * width - 0.5, 0, columns - 1)
            ys = np.clip((box[1] + (steps - 0.5) * box[3]) * height - 0.5, 0, rows - 1)
            across = np.maximum(0, 1 - np.abs(xs[:, None] - np.arange(columns))).mean(axis=0)
            down = np.maximum(0, 1 - np.abs(ys[:, None] - np.arange(rows))).mean(axis=0)
            per_level.append(np.einsum("chw,h,w->c", values, down, across))
        pooled.append(np.mean(per_level, axis=0))
    return np.stack(pooled)


@pytest.mark.parametrize("size", [1, 7])
def test_pooled_objects_equal_the_reference(size):
    """Also of a padded image and of boxes that end at its border, and of a box smaller than a cell."""
    targets = targets_of((3, 2))
    boxes = targets.boxes_cxcywh
    boxes[-1] = torch.tensor([0.75, 0.5, 0.5, 1.0])
    boxes[0, 2:] = 0.02
    found = pooled_objects(memory(), targets, STRIDES, size)
    np.testing.assert_allclose(found.numpy(), reference_pooled(memory(), targets, size), atol=1e-6)


def test_what_stands_in_padding_does_not_matter():
    targets = targets_of((2, 3))
    targets.boxes_cxcywh[-1] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    found = [pooled_objects(memory(padding=value), targets, STRIDES) for value in (0.0, 1e6)]
    assert torch.equal(*found)


@pytest.mark.parametrize("more", [0, 1, 5])
def test_an_object_is_pooled_alike_whatever_its_image_is_padded_to(more):
    """Also one of 67 x 76 pixels, whose last row and column of cells, of 9 and 10, are of padding in part."""
    targets = replace(targets_of((2,)), image_sizes=SIZES[1:])
    alone = torch.rand(1, 3, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    padded = F.pad(alone, (0, more, 0, more), value=7.0)

    def pooled(maps):
        shape = tuple(maps.shape[-2:])
        mask = torch.zeros(1, shape[0] * shape[1], dtype=torch.bool)
        encoded = Memory(maps.flatten(2).transpose(1, 2), (shape,), mask, torch.ones(1, 1, 2))
        return pooled_objects(encoded, targets, STRIDES[:1])

    torch.testing.assert_close(pooled(padded), pooled(alone), atol=1e-12, rtol=0)


def attributes_of(features="label+scale", table=None, dtype=torch.float64):
    torch.manual_seed(0)
    return ObjectAttributes(CHANNELS, WordBank(micro.vocabulary()), features, table).to(dtype)


@pytest.mark.parametrize("features, columns", [("label", []), ("label+scale", [2, 3]), ("label+box", [0, 1, 2, 3])])
def test_attributes_are_words_and_sizes(features, columns):
    module, targets = attributes_of(features), detr_cases.targets((2, 0, 1), words=3)
    words = micro.vocabulary().embeddings[targets.labels].double()
    known = torch.cat([words, targets.boxes_cxcywh[:, columns].double()], dim=1)
    wanted = known @ module.projection.weight.T + module.projection.bias
    torch.testing.assert_close(module(targets), wanted, atol=1e-7, rtol=0)


def test_attributes_of_another_teacher_and_of_no_base_word():
    other = WordBank(micro.vocabulary(names=micro.NAMES[:3], dim=6, frequency=0.4))
    module, targets = attributes_of(table=other), detr_cases.targets((2,), words=3)
    assert module.projection.in_features == 6 + 2 and module(targets).shape == (2, CHANNELS)
    novel = Targets(torch.tensor([3]), targets.boxes_cxcywh[:1], (1,), ("a.jpg (id 7)",), 4, ((60, 100),))
    with pytest.raises(UsageError, match=r"class 3, but there are 3 base words; images a.jpg \(id 7\)"):
        module(novel)
    with pytest.raises(UsageError, match="label\\+scale"):
        attributes_of("colour")


def reference_loss(encoded, attributes, scale, ignored):
    """Pair by pair (Eq. 4, 5)."""
    encoded, attributes = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (encoded, attributes))
    total, count = 0.0, len(encoded)
    for rows, columns in ((encoded, attributes), (attributes, encoded)):
        for i in range(count):
            scores = [scale * rows[i] @ columns[j] for j in range(count) if j == i or not ignored[i, j]]
            total += math.log(sum(map(math.exp, scores))) - scale * rows[i] @ columns[i]
    return total / (2 * count)


@pytest.mark.parametrize("ignored, most, pairs", [("none", 0.0, 0), ("near", 0.1, 7), ("label", math.inf, 13)])
def test_loss_equals_the_reference(ignored, most, pairs):
    targets = targets_of((3, 2), words=2)
    targets.boxes_cxcywh[1, 2:] = targets.boxes_cxcywh[0, 2:] * torch.tensor([1.05, 0.95])
    targets.labels[:] = torch.tensor([0, 0, 1, 0, 1])
    module = AlignNet(STRIDES, 3, ignored).double()
    attributes = attributes_of()(targets)
    log_sides = targets.boxes_cxcywh[:, 2:].double().log()
    same = near_duplicates(targets.labels, log_sides, most).numpy()
    for i, j in np.ndindex(5, 5):
        near = np.abs((log_sides[i] - log_sides[j]).numpy()).max() < most
        assert same[i, j] == (near and targets.labels[i] == targets.labels[j])
    assert same.sum() == pairs
    wanted = reference_loss(reference_pooled(memory(), targets, 3), attributes.detach().numpy(), 1 / 0.07, same)
    assert module(memory(), targets, attributes).item() == pytest.approx(wanted, rel=1e-5)


def test_order_of_the_objects_does_not_matter():
    targets = targets_of((4, 0), words=3)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = replace(targets, labels=targets.labels[order], boxes_cxcywh=targets.boxes_cxcywh[order])
    module, attributes = AlignNet(STRIDES).double(), attributes_of()
    losses = [module(memory(), rows, attributes(rows)).item() for rows in (targets, shuffled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12) and losses[0] > 0


@pytest.mark.parametrize("counts", [(0, 0), (0, 1)])
def test_one_object_or_none_costs_nothing_and_every_parameter_has_a_gradient(counts):
    encoded, targets = memory(), targets_of(counts, words=3)
    encoded.tokens.requires_grad_()
    module, attributes = AlignNet(STRIDES).double(), attributes_of()
    loss = module(encoded, targets, attributes(targets))
    loss.backward()
    assert loss.item() == 0 and encoded.tokens.grad.abs().sum() == 0
    assert all(p.grad is not None for p in (*module.parameters(), *attributes.parameters()))


def test_the_scale_is_learned_and_capped():
    targets, module = targets_of((3, 2), words=3), AlignNet(STRIDES).double()
    attributes = attributes_of()(targets).detach()
    module(memory(), targets, attributes).backward()
    assert module.log_scale.grad.abs() > 0
    losses = []
    for value in (math.log(100), 9.0):
        torch.nn.init.constant_(module.log_scale, value)
        losses.append(module(memory(), targets, attributes).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_half_precision_is_left():
    targets = targets_of((3, 2), words=3)
    plain = memory()
    half = Memory(plain.tokens.bfloat16(), SHAPES, plain.padding_mask, plain.valid_ratios.float())
    module, attributes = AlignNet(STRIDES), attributes_of(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(half, targets, attributes(targets))
    assert loss.dtype == torch.float32
    exact = Memory(half.tokens.double(), SHAPES, plain.padding_mask, plain.valid_ratios)
    wanted = AlignNet(STRIDES).double()(exact, targets, attributes(targets))
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


COUNTS = (3, 1)  # objects of two images, one in each process


def gathered(encoded, targets, weight):
    module = AlignNet(STRIDES, 2, "near", gather=True).double()
    changed = Memory(encoded.tokens @ weight, SHAPES, encoded.padding_mask, encoded.valid_ratios)
    words = F.one_hot(targets.labels, CHANNELS).double()
    return module, module(changed, targets, words @ weight)


def case():
    targets, weight = targets_of(COUNTS, words=2), torch.eye(CHANNELS, dtype=torch.float64)
    weight = weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return memory(), targets, weight.requires_grad_()


def in_two_processes(out):
    encoded, targets, weight = case()
    rank = comm.get_rank()
    own = slice(0, COUNTS[0]) if rank == 0 else slice(COUNTS[0], None)
    mine = replace(
        targets,
        labels=targets.labels[own],
        boxes_cxcywh=targets.boxes_cxcywh[own],
        counts=COUNTS[rank : rank + 1],
        names=targets.names[:1],
        image_sizes=SIZES[rank : rank + 1],
    )
    parts = (getattr(encoded, name)[rank : rank + 1] for name in ("tokens", "padding_mask", "valid_ratios"))
    tokens, padding, ratios = parts
    module, loss = gathered(Memory(tokens, SHAPES, padding, ratios), mine, weight)
    loss.backward()
    for gradient in (weight.grad, module.log_scale.grad):  # as DistributedDataParallel averages them
        torch.distributed.all_reduce(gradient)
        gradient /= comm.get_world_size()
    torch.save((loss.detach(), weight.grad, module.log_scale.grad), out / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    launch(in_two_processes, 2, args=(tmp_path,), use_cuda=False)
    encoded, targets, weight = case()
    module, loss = gathered(encoded, targets, weight)
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for value, wanted in zip(found, (loss.detach(), weight.grad, module.log_scale.grad)):
            torch.testing.assert_close(value, wanted, atol=1e-9, rtol=1e-6)
