"""CCKT-Det's losses, cost and scores against plain float64 Python, and its stages."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.methods.cckt.part import CCKT, product_logits, similarity_logits
from ovdet2.modeling.detr.criterion import SetCriterion
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.memory import Queries
from ovdet2.modeling.detr.targets import Targets
from ovdet2.vocabulary.bank import WordBank
from tests import detr_cases, micro
from tests.test_detr_criterion import focal_reference
from tests.test_region_contrast import class_reference, dot, pair_reference

LAYERS, QUERIES, WORDS, DIM = 3, 6, 3, 8
TAU = 0.07


def part(**options):
    torch.manual_seed(0)
    return CCKT(WordBank(micro.vocabulary()), dim=5, num_heads=LAYERS, **options)


def targets(counts, embedded=0.7, seed=0):
    """Objects of the three base words, some without a crop."""
    made = detr_cases.records(counts, WORDS, seed)
    generator = torch.Generator().manual_seed(seed)
    for record in made:
        instances = record["instances"]
        rows = F.normalize(torch.randn(len(instances), DIM, generator=generator), dim=1)
        instances.gt_embeddings = rows.half()
        instances.gt_embedded = torch.rand(len(instances), generator=generator) < embedded
    return Targets.of_records(made, "cpu")


def outputs(images=2, queries=QUERIES, dtype=torch.float64, seed=1):
    found = detr_cases.outputs(LAYERS, images, queries, WORDS, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(LAYERS, images, queries, DIM, generator=generator, dtype=torch.float64)
    return found | {"pred_embeddings": F.normalize(rows, dim=-1).to(dtype)}


def matched(found, wanted, module, auxiliary=True):
    costs = [(1.0, module.similarity_cost)]
    return SetCriterion(HungarianMatcher(extra_costs=costs), auxiliary=auxiliary)(found, wanted)[1]


def triples(matches):
    return list(zip(matches.image.tolist(), matches.query.tolist(), matches.target.tolist()))


class TestLogits:
    @given(st.floats(-60, 60), st.floats(-60, 60))
    @settings(max_examples=100, deadline=None)
    def test_product_of_probabilities(self, first, second):
        with localcontext() as context:
            context.prec = 80
            product = 1 / ((1 + (-Decimal(first)).exp()) * (1 + (-Decimal(second)).exp()))
            expected = float(product.ln() - (1 - product).ln())
        for dtype, rel in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            found = product_logits(torch.tensor(first, dtype=dtype), torch.tensor(second, dtype=dtype))
            assert found.item() == pytest.approx(expected, rel=rel, abs=1e-5)

    def test_product_at_the_ends_is_finite(self):
        ends = torch.tensor([-1e4, -200.0, 200.0, 1e4])
        assert torch.isfinite(product_logits(ends, ends)).all() and (product_logits(ends, ends.flip(0)) < 0).all()

    def test_similarity(self):
        found = outputs()["pred_embeddings"]
        words = micro.vocabulary().embeddings
        logits = similarity_logits(found, words, TAU)
        assert torch.equal(similarity_logits(found, words, TAU, -2.5), logits - 2.5)
        assert logits.shape == (LAYERS, 2, QUERIES, 5) and logits.dtype == torch.float64
        expected = dot(found[1, 0, 2].tolist(), words[4].double().tolist()) / TAU
        assert logits[1, 0, 2, 4].item() == pytest.approx(expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = similarity_logits(found.bfloat16(), words, TAU)
        assert half.dtype == torch.float32 and torch.allclose(
            half, similarity_logits(found.bfloat16().float(), words, TAU)
        )


class TestMatching:
    @pytest.mark.parametrize("bias", [0.0, -4.6])
    def test_similarity_cost_equals_the_reference(self, bias):
        module, found, wanted = part(bias=bias), outputs(), targets((2, 1))
        cost = module.similarity_cost(found, wanted.padded(wanted.labels))
        assert cost.shape == (LAYERS, 2, QUERIES, 2)
        words = micro.vocabulary().embeddings.double().tolist()
        for layer in range(LAYERS):
            for query in range(QUERIES):
                for column, label in enumerate(wanted.labels[:2].tolist()):
                    cosine = dot(found["pred_embeddings"][layer, 0, query].tolist(), words[label])
                    expected = -1 / (1 + math.exp(-cosine / TAU - bias))
                    assert cost[layer, 0, query, column].item() == pytest.approx(expected)

    def test_it_decides_between_queries_that_are_alike_otherwise(self):
        """The query whose embedding is the word's is the object's, in each layer another one."""
        module, wanted = part(), targets((1,))
        found = {key: value[:, :, :1].expand(-1, -1, QUERIES, -1).clone() for key, value in outputs(1).items()}
        word = micro.vocabulary().embeddings[wanted.labels[0]].double()
        for layer, query in enumerate((4, 0, 2)):
            found["pred_embeddings"][layer, 0, query] = word
        assert [int(m.query) for m in matched(found, wanted, module)] == [4, 0, 2]

    def test_no_objects(self):
        module, wanted = part(), targets((0, 0))
        assert module.similarity_cost(outputs(), wanted.padded(wanted.labels)).shape == (LAYERS, 2, QUERIES, 0)


class TestLosses:
    @pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (1, 0)])
    @pytest.mark.parametrize("auxiliary", [True, False])
    def test_instance_contrast_equals_the_reference(self, counts, auxiliary):
        module, found, wanted = part(), outputs(), targets(counts)
        matches = matched(found, wanted, module, auxiliary)
        losses = module.losses(found, wanted, matches, 2.5)
        places = {"_0": 0, "_1": 1, "": 2} if auxiliary else {"": 2}
        assert set(losses) == {f"loss_contrast{place}" for place in places}
        for pairs, (place, layer) in zip(matches, places.items()):
            expected = sum(
                pair_reference(
                    found["pred_embeddings"][layer, image].tolist(),
                    wanted.embeddings.double().tolist(),
                    [(q, t) for i, q, t in triples(pairs) if i == image and wanted.embedded[t]],
                )
                for image in range(2)
            )
            assert losses[f"loss_contrast{place}"].item() == pytest.approx(expected / 2.5, rel=1e-9)

    def test_batch_contrast_is_that_of_one_large_image(self):
        module, found, wanted = part(contrast="batch"), outputs(), targets((3, 2))
        matches = matched(found, wanted, module)
        rows = found["pred_embeddings"][-1].flatten(0, 1).tolist()
        pairs = [(i * QUERIES + q, t) for i, q, t in triples(matches[-1]) if wanted.embedded[t]]
        expected = pair_reference(rows, wanted.embeddings.double().tolist(), pairs)
        assert module.losses(found, wanted, matches, 1.0)["loss_contrast"].item() == pytest.approx(expected)

    def test_class_contrast_equals_the_reference(self):
        """One crop of each class, so that nothing is left to the draw; the last class has none."""
        module, found = part(contrast="class"), outputs()
        rows = F.normalize(torch.randn(WORDS, 1, DIM), dim=2)
        module.class_crops.fill(rows, torch.tensor([1, 1, 0]))
        crops = {label: rows[label, 0].double().tolist() for label in (0, 1)}
        for counts in ((3, 2), (0, 0), (1, 0)):
            wanted = targets(counts, embedded=0.0)  # their own crops are not asked for
            matches = matched(found, wanted, module)
            queries = [i * QUERIES + q for i, q, _ in triples(matches[-1])]
            labels = [int(wanted.labels[t]) for _, _, t in triples(matches[-1])]
            expected = class_reference(found["pred_embeddings"][-1].flatten(0, 1).tolist(), queries, labels, crops)
            assert module.losses(found, wanted, matches, 2.0)["loss_contrast"].item() == pytest.approx(expected / 2)

    @pytest.mark.parametrize("bias", [0.0, -4.6])
    def test_focal_loss_of_the_similarity(self, bias):
        module, found, wanted = part(class_loss="both", bias=bias), outputs(), targets((2, 1))
        matches = matched(found, wanted, module)
        words = micro.vocabulary().embeddings[:WORDS].double().tolist()
        label_of = {(i, q): int(wanted.labels[t]) for i, q, t in triples(matches[0])}
        expected = sum(
            focal_reference(dot(row, word) / TAU + bias, label_of.get((image, query)) == k)
            for image, rows in enumerate(found["pred_embeddings"][0].tolist())
            for query, row in enumerate(rows)
            for k, word in enumerate(words)
        )
        losses = module.losses(found, wanted, matches, 3.0)
        assert losses["loss_similarity_0"].item() == pytest.approx(expected / 3, rel=1e-5)
        assert len(losses) == 2 * LAYERS

    def test_more_objects_than_queries(self):
        module, found, wanted = part(), outputs(1, queries=2), targets((5,), embedded=1.1)
        matches = matched(found, wanted, module)
        pairs = [(q, t) for _, q, t in triples(matches[-1])]
        expected = pair_reference(found["pred_embeddings"][-1, 0].tolist(), wanted.embeddings.double().tolist(), pairs)
        assert len(pairs) == 2
        assert module.losses(found, wanted, matches, 1.0)["loss_contrast"].item() == pytest.approx(expected)

    def test_eq_7_puts_the_class_loss_on_the_similarity(self):
        module = part(class_loss="similarity", contrast="none")
        found = outputs(dtype=torch.float32) | {"hidden": torch.randn(LAYERS, 2, QUERIES + 4, 5)}
        seen = module.training_outputs(found)
        own = module.embed(found["hidden"])[:, :, :QUERIES]  # those after are of another method's queries
        assert torch.equal(seen["pred_embeddings"], own)
        assert torch.allclose(seen["pred_logits"], own @ micro.vocabulary().embeddings[:WORDS].T / TAU)
        assert torch.equal(part().training_outputs(found)["pred_logits"], found["pred_logits"])

    def test_without_cached_embeddings(self):
        module, found, wanted = part(), outputs(), detr_cases.targets((2, 1), WORDS)
        with pytest.raises(UsageError, match="MODEL.CCKT.REGION_CACHE"):
            module.losses(found, wanted, matched(found, wanted, module), 1.0)


class TestStages:
    def test_before_its_start_neither_loss_nor_cost(self):
        module, found, wanted = part(contrast_start=7), outputs(), targets((2, 1))
        labels = wanted.padded(wanted.labels)
        full = part()
        for start, counts in ((6, False), (7, True), (8, True)):
            with EventStorage(start):
                losses = module.losses(found, wanted, matched(found, wanted, module), 1.0)
                cost = module.similarity_cost(found, labels)
            if counts:
                assert torch.equal(cost, full.similarity_cost(found, labels)) and losses["loss_contrast"] > 0
            else:
                assert cost.abs().sum() == 0 and cost.shape == (LAYERS, 2, QUERIES, 2)
                assert all(value == 0 for value in losses.values())

    def test_heads_have_a_gradient_at_every_stage(self):
        module, wanted = part(contrast_start=7), targets((2, 1))
        with EventStorage(0):
            found = module.training_outputs(
                outputs(dtype=torch.float32) | {"hidden": torch.randn(LAYERS, 2, QUERIES, 5)}
            )
            losses = module.losses(found, wanted, matched(found, wanted, module), 1.0)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in module.parameters())

    def test_a_similarity_that_a_class_loss_trains_matches_from_the_first_step(self):
        module, found, wanted = part(class_loss="both", contrast_start=7), outputs(), targets((2, 1))
        with EventStorage(0):
            assert module.similarity_cost(found, wanted.padded(wanted.labels)).abs().sum() > 0


class TestScores:
    @torch.no_grad()
    def test_three_ways_over_all_words(self):
        hidden, logits = torch.randn(LAYERS, 2, QUERIES, 5), torch.randn(1, 2, QUERIES, 5)
        queries = Queries(torch.zeros(2, QUERIES, 5), None, torch.zeros(2, QUERIES, 4), words=torch.zeros(2, QUERIES))
        scored = {}
        for score in ("class", "similarity", "product"):
            module = part(score=score).eval()
            found = module.scored({"pred_logits": logits, "hidden": hidden}, queries)
            scored[score] = found["pred_logits"].sigmoid()
            assert found["words"] is queries.words
        embeddings = F.normalize(module.heads[-1](hidden[-1].flatten(0, 1)), dim=1).unflatten(0, (2, QUERIES))
        expected = (embeddings @ micro.vocabulary().embeddings.T / TAU).sigmoid()
        assert torch.allclose(scored["similarity"][0], expected, atol=1e-6)
        assert torch.equal(scored["class"], logits.sigmoid())
        assert torch.allclose(scored["product"], scored["class"] * scored["similarity"], atol=1e-6)

    @torch.no_grad()
    def test_layers(self):
        """As many as there are class logits of, each by its own head."""
        hidden, module = torch.randn(LAYERS, 1, QUERIES, 5), part().eval()
        queries = Queries(torch.zeros(1, QUERIES, 5), None, torch.zeros(1, QUERIES, 4))
        every = module.scored({"pred_logits": torch.zeros(LAYERS, 1, QUERIES, 5), "hidden": hidden}, queries)
        last = module.scored({"pred_logits": torch.zeros(1, 1, QUERIES, 5), "hidden": hidden}, queries)
        assert every["pred_logits"].shape[0] == LAYERS and torch.equal(every["pred_logits"][-1:], last["pred_logits"])
        assert not torch.equal(every["pred_logits"][0], every["pred_logits"][1]) and last["words"] is None

    def test_one_head_for_all_layers(self):
        module = CCKT(WordBank(micro.vocabulary()), dim=5, num_heads=1)
        hidden = torch.randn(1, 2, QUERIES, 5).expand(LAYERS, -1, -1, -1)
        found = module.embed(hidden)
        assert len(found) == LAYERS and torch.equal(found[0], found[2]) and len(module.embed(hidden, False)) == 1


@pytest.mark.parametrize("options, message", [
    ({"contrast": "pairs"}, "CONTRAST is 'pairs'"),
    ({"score": "both"}, "SCORE is 'both'"),
    ({"class_loss": "none"}, "CLASS_LOSS_ON is 'none'"),
    ({"contrast": "none"}, "neither MODEL.CCKT.CONTRAST nor CLASS_LOSS_ON trains"),
    ({"class_loss": "similarity", "score": "product"}, "nothing trains the class branch"),
])  # fmt: skip
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        part(**options)
