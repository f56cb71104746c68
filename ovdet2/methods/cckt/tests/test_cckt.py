"""CCKT-Det's losses, cost and scores against plain float64 Python, and its stages."""

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.methods.cckt.part import CCKT, EMBEDDINGS, object_crops, product_logits, similarity_logits
from ovdet2.methods.cckt.sample import ObjectCrops
from ovdet2.methods.cckt.semantic_priors import CarriedWords
from ovdet2.methods.cckt.tests.test_region_contrast import class_reference, dot, pair_reference
from ovdet2.modeling.detr.criterion import SetCriterion
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.memory import Queries
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.vocabulary.bank import WordBank
from tests import detr_cases, micro
from tests.test_detr_criterion import focal_reference

LAYERS, QUERIES, WORDS, DIM = 3, 6, 3, 8
TAU = 0.07


def part(**options):
    torch.manual_seed(0)
    return CCKT(WordBank(micro.vocabulary()), dim=5, num_heads=LAYERS, **options)


def step(counts, embedded=0.7, seed=0):
    """Of objects of the three base words, some without a crop."""
    made = detr_cases.samples(counts, WORDS, seed)
    generator = torch.Generator().manual_seed(seed)
    for sample in made:
        rows = F.normalize(torch.randn(len(sample.instances), DIM, generator=generator), dim=1)
        sample.attach(ObjectCrops(rows.half(), torch.rand(len(rows), generator=generator) < embedded))
    return detr_cases.step(made)


def outputs(images=2, queries=QUERIES, dtype=torch.float64, seed=1):
    found = detr_cases.outputs(LAYERS, images, queries, WORDS, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(LAYERS, images, queries, DIM, generator=generator, dtype=torch.float64)
    return found.with_added(**{EMBEDDINGS: F.normalize(rows, dim=-1).to(dtype)})


def padded_labels(step):
    return step.targets.padded(step.targets.labels)


def crops_of(step):
    return object_crops(step.samples, torch.device("cpu"))


def matched(found, wanted, module, auxiliary=True):
    matcher = HungarianMatcher(extra_costs=module.matching_costs())
    return SetCriterion(matcher, auxiliary=auxiliary)(found, wanted.targets)[1]


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
        found = outputs().added[EMBEDDINGS]
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
        module, found, wanted = part(bias=bias), outputs(), step((2, 1))
        cost = module.similarity_cost(found, padded_labels(wanted))
        assert cost.shape == (LAYERS, 2, QUERIES, 2)
        words = micro.vocabulary().embeddings.double().tolist()
        for layer in range(LAYERS):
            for query in range(QUERIES):
                for column, label in enumerate(wanted.targets.labels[:2].tolist()):
                    cosine = dot(found.added[EMBEDDINGS][layer, 0, query].tolist(), words[label])
                    expected = -1 / (1 + math.exp(-cosine / TAU - bias))
                    assert cost[layer, 0, query, column].item() == pytest.approx(expected)

    def test_it_decides_between_queries_that_are_alike_otherwise(self):
        """The query whose embedding is the word's is the object's, in each layer another one."""
        module, wanted = part(), step((1,))
        found = detr_cases.changed(outputs(1), lambda value: value[:, :, :1].expand(-1, -1, QUERIES, -1).clone())
        word = micro.vocabulary().embeddings[wanted.targets.labels[0]].double()
        for layer, query in enumerate((4, 0, 2)):
            found.added[EMBEDDINGS][layer, 0, query] = word
        assert [int(m.query) for m in matched(found, wanted, module)] == [4, 0, 2]

    def test_no_objects(self):
        module, wanted = part(), step((0, 0))
        assert module.similarity_cost(outputs(), padded_labels(wanted)).shape == (LAYERS, 2, QUERIES, 0)


class TestLosses:
    @pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (1, 0)])
    @pytest.mark.parametrize("auxiliary", [True, False])
    def test_instance_contrast_equals_the_reference(self, counts, auxiliary):
        module, found, wanted = part(), outputs(), step(counts)
        matches = matched(found, wanted, module, auxiliary)
        losses = module.losses(wanted, found, matches, 2.5)
        places = {"_0": 0, "_1": 1, "": 2} if auxiliary else {"": 2}
        assert set(losses) == {f"loss_contrast{place}" for place in places}
        for pairs, (place, layer) in zip(matches, places.items()):
            expected = sum(
                pair_reference(
                    found.added[EMBEDDINGS][layer, image].tolist(),
                    crops_of(wanted).embeddings.double().tolist(),
                    [(q, t) for i, q, t in triples(pairs) if i == image and crops_of(wanted).embedded[t]],
                )
                for image in range(2)
            )
            assert losses[f"loss_contrast{place}"].item() == pytest.approx(expected / 2.5, rel=1e-9)

    def test_batch_contrast_is_that_of_one_large_image(self):
        module, found, wanted = part(contrast="batch"), outputs(), step((3, 2))
        matches = matched(found, wanted, module)
        rows = found.added[EMBEDDINGS][-1].flatten(0, 1).tolist()
        pairs = [(i * QUERIES + q, t) for i, q, t in triples(matches[-1]) if crops_of(wanted).embedded[t]]
        expected = pair_reference(rows, crops_of(wanted).embeddings.double().tolist(), pairs)
        assert module.losses(wanted, found, matches, 1.0)["loss_contrast"].item() == pytest.approx(expected)

    def test_class_contrast_equals_the_reference(self):
        """One crop of each class, so that nothing is left to the draw; the last class has none."""
        module, found = part(contrast="class"), outputs()
        rows = F.normalize(torch.randn(WORDS, 1, DIM), dim=2)
        module.class_crops.fill(rows, torch.tensor([1, 1, 0]))
        crops = {label: rows[label, 0].double().tolist() for label in (0, 1)}
        for counts in ((3, 2), (0, 0), (1, 0)):
            wanted = step(counts, embedded=0.0)  # their own crops are not asked for
            matches = matched(found, wanted, module)
            queries = [i * QUERIES + q for i, q, _ in triples(matches[-1])]
            labels = [int(wanted.targets.labels[t]) for _, _, t in triples(matches[-1])]
            expected = class_reference(found.added[EMBEDDINGS][-1].flatten(0, 1).tolist(), queries, labels, crops)
            assert module.losses(wanted, found, matches, 2.0)["loss_contrast"].item() == pytest.approx(expected / 2)

    def test_raw_features_equal_the_reference(self):
        """Crops of norm 20, as the published code takes them: the unit rows at a twentieth of the temperature."""
        found, wanted, norm = outputs(), step((3, 2)), 20.0
        module = part(contrast_temperature=TAU / norm)
        matches, crops = matched(found, wanted, module), crops_of(wanted)
        raw = (norm * crops.embeddings.double()).tolist()
        expected = sum(
            pair_reference(
                found.added[EMBEDDINGS][-1, image].tolist(),
                raw,
                [(q, t) for i, q, t in triples(matches[-1]) if i == image and crops.embedded[t]],
            )
            for image in range(2)
        )
        assert module.losses(wanted, found, matches, 1.0)["loss_contrast"].item() == pytest.approx(expected, rel=1e-9)
        cost = module.similarity_cost(found, padded_labels(wanted))
        assert torch.equal(cost, part().similarity_cost(found, padded_labels(wanted)))
        by_class = part(contrast="class", contrast_temperature=TAU / norm)
        rows = F.normalize(torch.randn(WORDS, 1, DIM), dim=2)
        by_class.class_crops.fill(rows, torch.ones(WORDS, dtype=torch.int64))
        matches = matched(found, wanted, by_class)
        queries = [i * QUERIES + q for i, q, _ in triples(matches[-1])]
        labels = [int(wanted.targets.labels[t]) for _, _, t in triples(matches[-1])]
        raw_rows = {label: (norm * rows[label, 0].double()).tolist() for label in range(WORDS)}
        expected = class_reference(found.added[EMBEDDINGS][-1].flatten(0, 1).tolist(), queries, labels, raw_rows)
        assert by_class.losses(wanted, found, matches, 1.0)["loss_contrast"].item() == pytest.approx(expected)

    @pytest.mark.parametrize("bias", [0.0, -4.6])
    def test_focal_loss_of_the_similarity(self, bias):
        module, found, wanted = part(class_loss="both", bias=bias), outputs(), step((2, 1))
        matches = matched(found, wanted, module)
        words = micro.vocabulary().embeddings[:WORDS].double().tolist()
        label_of = {(i, q): int(wanted.targets.labels[t]) for i, q, t in triples(matches[0])}
        expected = sum(
            focal_reference(dot(row, word) / TAU + bias, label_of.get((image, query)) == k)
            for image, rows in enumerate(found.added[EMBEDDINGS][0].tolist())
            for query, row in enumerate(rows)
            for k, word in enumerate(words)
        )
        losses = module.losses(wanted, found, matches, 3.0)
        assert losses["loss_similarity_0"].item() == pytest.approx(expected / 3, rel=1e-5)
        assert len(losses) == 2 * LAYERS

    def test_more_objects_than_queries(self):
        module, found, wanted = part(), outputs(1, queries=2), step((5,), embedded=1.1)
        matches = matched(found, wanted, module)
        pairs = [(q, t) for _, q, t in triples(matches[-1])]
        expected = pair_reference(
            found.added[EMBEDDINGS][-1, 0].tolist(), crops_of(wanted).embeddings.double().tolist(), pairs
        )
        assert len(pairs) == 2
        assert module.losses(wanted, found, matches, 1.0)["loss_contrast"].item() == pytest.approx(expected)

    def test_eq_7_puts_the_class_loss_on_the_similarity(self):
        module = part(class_loss="similarity", contrast="none")
        found = replace(outputs(dtype=torch.float32), hidden=torch.randn(LAYERS, 2, QUERIES, 5))
        seen = module.alter_outputs(found)
        own = module.embed(found.hidden)
        assert torch.equal(seen.added[EMBEDDINGS], own)
        assert torch.allclose(seen.pred_logits, own @ micro.vocabulary().embeddings[:WORDS].T / TAU)
        assert torch.equal(part().alter_outputs(found).pred_logits, found.pred_logits)
        first = seen.take(slice(4))  # the others are of another method's queries
        assert torch.equal(first.added[EMBEDDINGS], own[:, :, :4]) and first.pred_logits.shape[2] == 4

    def test_without_cached_embeddings(self):
        module, found, wanted = part(), outputs(), detr_cases.step(detr_cases.samples((2, 1), WORDS))
        with pytest.raises(UsageError, match="MODEL.CCKT.REGION_CACHE"):
            module.losses(wanted, found, matched(found, wanted, module), 1.0)


class TestStages:
    def test_before_its_start_neither_loss_nor_cost(self):
        module, found, wanted = part(contrast_start=7), outputs(), step((2, 1))
        labels = padded_labels(wanted)
        full = part()
        for start, counts in ((6, False), (7, True), (8, True)):
            with EventStorage(start):
                losses = module.losses(wanted, found, matched(found, wanted, module), 1.0)
                cost = module.similarity_cost(found, labels)
            if counts:
                assert torch.equal(cost, full.similarity_cost(found, labels)) and losses["loss_contrast"] > 0
            else:
                assert cost.abs().sum() == 0 and cost.shape == (LAYERS, 2, QUERIES, 2)
                assert all(value == 0 for value in losses.values())

    def test_heads_have_a_gradient_at_every_stage(self):
        module, wanted = part(contrast_start=7), step((2, 1))
        with EventStorage(0):
            found = module.alter_outputs(
                replace(outputs(dtype=torch.float32), hidden=torch.randn(LAYERS, 2, QUERIES, 5))
            )
            losses = module.losses(wanted, found, matched(found, wanted, module), 1.0)
        sum(losses.values()).backward()
        assert all(p.grad is not None for p in module.parameters())

    def test_a_similarity_that_a_class_loss_trains_matches_from_the_first_step(self):
        module, found, wanted = part(class_loss="both", contrast_start=7), outputs(), step((2, 1))
        with EventStorage(0):
            assert module.similarity_cost(found, padded_labels(wanted)).abs().sum() > 0


def plain_queries(images):
    return Queries(torch.zeros(images, QUERIES, 5), None, torch.zeros(images, QUERIES, 4))


def decoded(logits, hidden):
    return DetrOutputs(logits, torch.zeros(*hidden.shape[:3], 4), hidden)


class TestScores:
    @torch.no_grad()
    def test_three_ways_over_all_words(self):
        hidden, logits = torch.randn(LAYERS, 2, QUERIES, 5), torch.randn(1, 2, QUERIES, 5)
        queries = plain_queries(2)
        scored = {}
        for score in ("class", "similarity", "product"):
            module = part(score=score).eval()
            found = module.score(decoded(logits, hidden), queries)
            scored[score] = found.pred_logits.sigmoid()
        embeddings = F.normalize(module.heads[-1](hidden[-1].flatten(0, 1)), dim=1).unflatten(0, (2, QUERIES))
        expected = (embeddings @ micro.vocabulary().embeddings.T / TAU).sigmoid()
        assert torch.allclose(scored["similarity"][0], expected, atol=1e-6)
        assert torch.equal(scored["class"], logits.sigmoid())
        assert torch.allclose(scored["product"], scored["class"] * scored["similarity"], atol=1e-6)

    @torch.no_grad()
    def test_layers(self):
        """As many as there are class logits of, each by its own head."""
        hidden, module = torch.randn(LAYERS, 1, QUERIES, 5), part().eval()
        every = module.score(decoded(torch.zeros(LAYERS, 1, QUERIES, 5), hidden), plain_queries(1))
        last = module.score(decoded(torch.zeros(1, 1, QUERIES, 5), hidden), plain_queries(1))
        assert every.layers == LAYERS and torch.equal(every.pred_logits[-1:], last.pred_logits)
        assert not torch.equal(every.pred_logits[0], every.pred_logits[1])

    def test_detections_are_told_the_word_of_their_query(self):
        words = torch.tensor([[3, -1, 2, 0, 0, 1], [4, 4, 4, -1, -1, -1]])
        found, module = Instances((9, 9), queries=torch.tensor([2, 1, 1])), part()
        module.annotate(found, plain_queries(2), 0)
        assert not found.has("prior_words")
        module.annotate(found, plain_queries(2).attach(CarriedWords(words)), 0)
        assert found.prior_words.tolist() == [2, -1, -1]

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
