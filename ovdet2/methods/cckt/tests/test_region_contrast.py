"""Regional contrastive distillation against sums in plain float64 Python, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.methods.cckt.region_contrast import ClassCrops, class_contrast, pair_contrast

TAU = 0.07


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b))


def log_sum(scores):
    top = max(scores)
    return top + math.log(math.fsum(math.exp(score - top) for score in scores))


def pair_reference(queries, crops, pairs, tau=TAU):
    """Eqs. 5 and 6 of one image; lists of rows, and pairs (query, crop) of those that take part."""
    total = 0.0
    for query, crop in pairs:
        own = dot(queries[query], crops[crop]) / tau
        to_student = log_sum([dot(crops[crop], other) / tau for other in queries]) - own
        to_teacher = log_sum([dot(queries[query], crops[other]) / tau for _, other in pairs]) - own
        total += (to_student + to_teacher) / 2
    return total


def class_reference(queries, matched, labels, crops, tau=TAU):
    """The published code's sums; ``crops`` is {class: row}."""
    total = 0.0
    for query, label in zip(matched, labels):
        if label in crops:
            scores = [dot(queries[query], crop) / tau for crop in crops.values()]
            total += log_sum(scores) - dot(queries[query], crops[label]) / tau
    for label, crop in crops.items():
        own = [dot(queries[query], crop) / tau for query, other in zip(matched, labels) if other == label]
        if own:
            total += log_sum([dot(query, crop) / tau for query in queries]) - sum(own) / len(own)
    return total / 2


def made(seed, images, queries, most, dim=6):
    """A batch with any number of objects, some without a crop."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = unit(images, queries, dim, seed=seed), unit(images, most, dim, seed=seed + 1)
    valid = torch.rand(images, most, generator=generator) < 0.7
    query = torch.stack([torch.randperm(queries, generator=generator)[:most] for _ in range(images)])
    return student, teacher, query, valid


class TestPairs:
    @given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9), st.integers(0, 5))
    @settings(max_examples=40, deadline=None)
    def test_equals_float64_reference(self, seed, images, queries, most):
        student, teacher, query, valid = made(seed, images, queries, min(most, queries))
        expected = math.fsum(
            pair_reference(student[i].tolist(), teacher[i].tolist(), [
                (int(query[i, j]), j) for j in range(query.shape[1]) if valid[i, j]
            ])
            for i in range(images)
        )  # fmt: skip
        teacher = teacher.masked_fill(~valid[..., None], float("nan"))  # what stands there must not matter
        found = pair_contrast(student, teacher, query.masked_fill(~valid, -1), valid)
        assert found.dtype == torch.float64 and found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        single = pair_contrast(student.float(), teacher.float(), query, valid)
        assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_batch_is_the_sum_of_its_images(self):
        batch = made(3, 3, 7, 4)
        singles = sum(pair_contrast(*(part[i : i + 1] for part in batch)) for i in range(3))
        assert torch.isclose(pair_contrast(*batch), singles)

    def test_order_of_objects_and_queries(self):
        student, teacher, query, valid = made(4, 1, 7, 4)
        value, places = pair_contrast(student, teacher, query, valid), torch.tensor([2, 0, 3, 1])
        assert torch.isclose(pair_contrast(student, teacher[:, places], query[:, places], valid[:, places]), value)
        moved = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        assert torch.isclose(pair_contrast(student[:, moved], teacher, moved.argsort()[query], valid), value)

    def test_gradients_of_no_and_one_object(self):
        """Without objects 0, and connected; with one the second direction is log 1."""
        student = unit(2, 5, 4).requires_grad_()
        for most in (0, 3):
            nothing = torch.zeros(2, most, dtype=torch.bool)
            value = pair_contrast(student, unit(2, most, 4), torch.zeros(2, most, dtype=torch.int64), nothing)
            (gradient,) = torch.autograd.grad(value, student)
            assert value.item() == 0 and torch.equal(gradient, torch.zeros_like(gradient))
        one = torch.tensor([[True], [False]])
        value = pair_contrast(student, unit(2, 1, 4), torch.full((2, 1), 3), one)
        rows, crop = student[0].tolist(), unit(2, 1, 4)[0, 0].tolist()
        expected = (log_sum([dot(crop, row) / TAU for row in rows]) - dot(crop, rows[3]) / TAU) / 2
        assert value.item() == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(value, student)
        assert torch.isfinite(gradient).all() and gradient[1].abs().sum() == 0 and (gradient[0].abs().sum(1) > 0).all()

    def test_gradient_is_numerically_right(self):
        student, teacher, query, valid = made(5, 2, 4, 3, dim=3)
        assert torch.autograd.gradcheck(
            lambda rows: pair_contrast(rows, teacher, query, valid), student.requires_grad_()
        )

    def test_half_precision_under_autocast_is_computed_in_full(self):
        student, teacher, query, valid = made(6, 2, 6, 3)
        half, crops = student.bfloat16(), teacher.half()
        exact = pair_contrast(half.double(), crops.double(), query, valid)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = pair_contrast(half, crops, query, valid)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-4)


class TestClasses:
    @given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 7), st.integers(1, 4))
    @settings(max_examples=40, deadline=None)
    def test_equals_float64_reference(self, seed, queries, objects, words):
        generator = torch.Generator().manual_seed(seed)
        student, teacher = unit(queries, 5, seed=seed), unit(words, 5, seed=seed + 1)
        active = torch.rand(words, generator=generator) < 0.7
        count = min(queries, objects)
        matched = torch.randperm(queries, generator=generator)[:count]
        own = torch.randint(words, (count,), generator=generator)
        crops = {word: teacher[word].tolist() for word in range(words) if active[word]}
        expected = class_reference(student.tolist(), matched.tolist(), own.tolist(), crops)
        teacher = teacher.masked_fill(~active[:, None], float("nan"))
        rows = student.clone().requires_grad_()
        found = class_contrast(rows, matched, own, teacher, active)
        assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        (gradient,) = torch.autograd.grad(found, rows)
        assert torch.isfinite(gradient).all()

    def test_order_of_classes_and_precision(self):
        student, teacher = unit(8, 5, seed=1), unit(4, 5, seed=2)
        matched, labels = torch.tensor([1, 6, 3]), torch.tensor([2, 0, 2])
        active = torch.tensor([True, False, True, True])
        exact = class_contrast(student, matched, labels, teacher, active)
        order = torch.tensor([3, 2, 0, 1])
        moved = class_contrast(student, matched, order.argsort()[labels], teacher[order], active[order])
        assert torch.isclose(moved, exact)
        half, crops = student.bfloat16(), teacher.half()
        exact = class_contrast(half.double(), matched, labels, crops.double(), active)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = class_contrast(half, matched, labels, crops, active)
        assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=1e-4)

    def test_every_crop_gets_its_turn(self):
        crops = ClassCrops()
        with pytest.raises(UsageError, match="no crops of classes yet: train with ovdet2's Trainer"):
            crops.draw()
        rows = torch.arange(3.0)[:, None, None] + torch.tensor([0.25, 0.5])[None, :, None].expand(3, 2, 4)
        crops.fill(rows.half(), torch.tensor([2, 1, 0]))
        torch.manual_seed(0)
        drawn = [crops.draw() for _ in range(40)]
        assert all(active.tolist() == [True, True, False] for _, active in drawn)
        first, second = ({row[label, 0].item() for row, _ in drawn} for label in (0, 1))
        assert first == {0.25, 0.5} and second == {1.25}
        assert not crops.state_dict()
