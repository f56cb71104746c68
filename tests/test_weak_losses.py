"""Losses between regions and texts: independent float64 statements, and properties."""

import itertools
import math

import pytest
import torch

from ovdet2.modeling.weak.losses import caption_bce, hungarian_bce, info_nce, prototype_bce, prototypes, tag_bce


def values(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flags(*shape, seed=1, share=0.3):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def bce(z, target):
    p = 1 / (1 + math.exp(-z))
    return -math.log(p if target else 1 - p)


def stated_tags(logits, targets):
    losses = []
    for row, wanted in zip(logits.tolist(), targets.tolist()):
        tags = [k for k, here in enumerate(wanted) if here]
        if tags:
            losses.append(sum(sum(bce(z, k == tag) for k, z in enumerate(row)) for tag in tags) / len(tags))
    return sum(losses) / len(losses) if losses else 0.0


def stated_captions(logits, positive, weight):
    losses = []
    for row, own in zip(logits.tolist(), positive.tolist()):
        matched = [bce(z, True) for z, here in zip(row, own) if here]
        other = sum(weight * bce(z, False) for z, here in zip(row, own) if not here)
        losses.append(sum(matched) / max(len(matched), 1) + other)
    return sum(losses) / len(losses) if losses else 0.0


def stated_hungarian(own, other):
    """By trying every assignment."""
    regions, nouns = own.shape
    pairs = min(regions, nouns)
    chosen = max(
        (
            list(zip(rows, columns))
            for rows in itertools.permutations(range(regions), pairs)
            for columns in itertools.combinations(range(nouns), pairs)
        ),
        key=lambda found: sum(own[r, c].item() for r, c in found),
        default=[],
    )
    return sum(
        bce(own[r, c].item(), True) + sum(bce(other[r, w].item(), False) for w in range(other.shape[1]))
        for r, c in chosen
    )


def stated_info_nce(logits, positive, ignored):
    losses = []
    for row, own, out in zip(logits.tolist(), positive.tolist(), ignored.tolist()):
        if any(own):
            total = sum(math.exp(z) for z, here, no in zip(row, own, out) if here or not no)
            logs = [z - math.log(total) for z, here in zip(row, own) if here]
            losses.append(-sum(logs) / len(logs))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("rows, columns", [(5, 7), (1, 4), (3, 1), (1, 1), (0, 4)])
class TestEquations:
    def test_tags(self, rows, columns):
        logits, targets = values(rows, columns), flags(rows, columns)
        assert tag_bce(logits, targets).item() == pytest.approx(stated_tags(logits, targets), rel=1e-12)

    @pytest.mark.parametrize("weight", [1.0, 0.125])
    def test_captions(self, rows, columns, weight):
        logits, positive = values(rows, columns), flags(rows, columns)
        expected = stated_captions(logits, positive, weight)
        assert caption_bce(logits, positive, weight).item() == pytest.approx(expected, rel=1e-12)

    def test_captions_with_a_weight_for_each_pair(self, rows, columns):
        logits, positive = values(rows, columns), flags(rows, columns)
        weights = torch.full((rows, columns), 0.125, dtype=torch.float64)
        assert torch.allclose(caption_bce(logits, positive, weights), caption_bce(logits, positive, 0.125))

    def test_hungarian(self, rows, columns):
        own, other = values(rows, columns)[:, :4], values(rows, 3, seed=2)
        assert hungarian_bce(own, other).item() == pytest.approx(stated_hungarian(own, other), rel=1e-12)

    def test_info_nce(self, rows, columns):
        logits, positive, ignored = values(rows, columns), flags(rows, columns), flags(rows, columns, seed=3)
        expected = stated_info_nce(logits, positive, ignored)
        assert info_nce(logits, positive, ignored).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


class TestPrototypes:
    def stated(self, features, weights, table, concepts, columns):
        total = 0.0
        for group, concept in enumerate(concepts.tolist()):
            summed = sum(w.item() * f for w, f in zip(weights[group], features[group]))
            cosines = (table @ (summed / summed.norm())).tolist()
            kept = [k for k in range(len(table)) if columns is None or columns[group, k] or k == concept]
            total += sum(bce(cosines[k] / 0.2, k == concept) for k in kept)
        return total / len(concepts)

    @pytest.mark.parametrize("federated", [False, True])
    @pytest.mark.parametrize("regions", [1, 4])
    def test_equation(self, regions, federated):
        features, weights = values(3, regions, 6), values(3, regions, seed=2).softmax(dim=1)
        table, concepts = torch.nn.functional.normalize(values(5, 6, seed=3), dim=1), torch.tensor([4, 0, 4])
        columns = flags(3, 5) if federated else None
        found = prototype_bce(features, weights, table, concepts, 0.2, columns)
        assert found.item() == pytest.approx(self.stated(features, weights, table, concepts, columns), rel=1e-9)

    def test_padding_adds_nothing(self):
        features, weights = values(2, 3, 6), values(2, 3, seed=2).softmax(dim=1)
        padded = torch.cat([features, torch.zeros(2, 2, 6, dtype=torch.float64)], dim=1)
        wider = torch.cat([weights, torch.ones(2, 2, dtype=torch.float64)], dim=1)
        assert torch.allclose(prototypes(padded, wider), prototypes(features, weights))

    def test_no_group(self):
        assert prototype_bce(values(0, 3, 6), values(0, 3), values(5, 6), torch.zeros(0).long(), 0.2) == 0


class TestProperties:
    def test_the_order_of_concepts_regions_and_captions_does_not_matter(self):
        logits, positive = values(5, 7), flags(5, 7)
        rows, columns = torch.randperm(5), torch.randperm(7)
        moved = logits[rows][:, columns], positive[rows][:, columns]
        for loss in (tag_bce, caption_bce, info_nce):
            assert torch.allclose(loss(logits, positive), loss(*moved)), loss
        assert torch.allclose(hungarian_bce(logits, logits[:, :2]), hungarian_bce(moved[0], logits[rows][:, :2]))

    @pytest.mark.parametrize("loss", [tag_bce, caption_bce, info_nce])
    def test_a_batch_is_the_mean_of_its_singles(self, loss):
        logits, positive = values(4, 6), flags(4, 6)
        positive[:, 0] = True  # each row counts
        singles = [loss(logits[row : row + 1], positive[row : row + 1]) for row in range(4)]
        assert torch.allclose(loss(logits, positive), torch.stack(singles).mean())

    @pytest.mark.parametrize("loss", [tag_bce, caption_bce, info_nce, hungarian_bce])
    def test_nothing_is_zero_with_a_gradient(self, loss):
        logits = values(0, 6).requires_grad_()
        second = logits * 2 if loss is hungarian_bce else flags(0, 6)
        value = loss(logits, second)
        value.backward()
        assert value == 0 and logits.grad is not None

    def test_a_region_without_a_tag_has_no_gradient(self):
        logits, targets = values(2, 3).requires_grad_(), torch.tensor([[False, True, False], [False, False, False]])
        tag_bce(logits, targets).backward()
        assert logits.grad[0].all() and not logits.grad[1].any()

    @pytest.mark.parametrize("loss", [tag_bce, caption_bce, info_nce])
    def test_half_precision_is_widened_and_large_logits_are_finite(self, loss):
        logits, positive = torch.tensor([[500.0, -500.0, 3.0]]).half(), torch.tensor([[False, True, False]])
        found = loss(logits, positive)
        assert found.dtype == torch.float32 and torch.isfinite(found)

    def test_gradients(self):
        positive = flags(3, 4)
        positive[:, 1] = True
        for loss in (tag_bce, caption_bce, info_nce):
            assert torch.autograd.gradcheck(lambda z, f=loss: f(z, positive), values(3, 4).requires_grad_())
