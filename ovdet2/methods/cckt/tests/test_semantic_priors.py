"""Semantic priors: which query carries which word, and what the words do to the queries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.data.samples import Sample
from ovdet2.errors import UsageError
from ovdet2.methods.cckt.sample import PresentWords
from ovdet2.methods.cckt.semantic_priors import CarriedWords, SemanticPriors, assign_words
from ovdet2.modeling.detr.memory import Queries
from ovdet2.vocabulary.bank import WordBank
from tests import micro

counts = st.lists(st.integers(0, 12), min_size=1, max_size=4)


def reference(words, queries, assignment):
    """Lists built up query by query, as the fact card tells it."""
    if not words:
        return [-1] * queries
    words = words[:queries]
    if assignment == "interleave":
        return [words[i % len(words)] for i in range(queries)]
    row = [word for word in words for _ in range(queries // len(words))]
    return row + words[: queries - len(row)]


class TestAssignment:
    @given(counts, st.integers(1, 30), st.sampled_from(["blocks", "interleave"]))
    @settings(max_examples=80, deadline=None)
    def test_equals_lists(self, numbers, queries, assignment):
        found = assign_words(torch.tensor(numbers), queries, assignment).tolist()
        assert found == [reference(list(range(count)), queries, assignment) for count in numbers]

    def test_worked_examples(self):
        """Of 300 queries and 7 words: 42 each, the last 6 go to the first 6 words."""
        [row] = assign_words(torch.tensor([7]), 300)
        assert torch.bincount(row).tolist() == [43] * 6 + [42] and row[294:].tolist() == [0, 1, 2, 3, 4, 5]
        assert assign_words(torch.tensor([3]), 100)[0, [0, 32, 33, 98, 99]].tolist() == [0, 0, 1, 2, 0]
        assert assign_words(torch.tensor([1, 0]), 4).tolist() == [[0] * 4, [-1] * 4]
        assert assign_words(torch.tensor([9]), 4).tolist() == [[0, 1, 2, 3]]

    @given(st.integers(1, 12), st.integers(1, 40))
    @settings(max_examples=60, deadline=None)
    def test_interleaving_gives_every_word_good_and_bad_proposals(self, words, queries):
        """Rank is a query's place by objectness. The mean ranks of an image's words lie within K of each other, where
        those of blocks lie N / K apart. That no id is favoured is a matter of the words' order: test_image_words.py."""
        count = min(words, queries)
        ranks = torch.arange(queries, dtype=torch.float64)
        for assignment, most in (("interleave", count), ("blocks", queries)):
            [row] = assign_words(torch.tensor([words]), queries, assignment)
            means = torch.stack([ranks[row == word].mean() for word in range(count)])
            assert (means.max() - means.min()).item() <= most
        [row] = assign_words(torch.tensor([words]), queries, "interleave")
        number = torch.bincount(row, minlength=count)
        assert number.max() - number.min() <= 1


def priors(assignment="blocks", words=None, dim=6):
    torch.manual_seed(0)
    return SemanticPriors(WordBank(words or micro.vocabulary()), dim, assignment)


def queries(batch=2, number=7, dim=6):
    return Queries(
        micro.wave((batch, number, dim)), micro.wave((batch, number, dim), 0.4), micro.wave((batch, number, 4))
    )


def samples(*lists):
    made = [Sample(file_name=f"{i}.jpg", image_id=i) for i in range(len(lists))]
    for sample, words in zip(made, lists):
        sample.attach(PresentWords(torch.tensor(words, dtype=torch.int64)))
    return made


class TestPriors:
    @pytest.mark.parametrize("assignment", ["blocks", "interleave"])
    @pytest.mark.parametrize("lists", [([4, 1], [0]), ([], [3, 2, 0]), ([], []), ([4, 3, 2, 1, 0], [1])])
    def test_adds_the_projected_word_to_the_content_alone(self, assignment, lists):
        module, before = priors(assignment).eval(), queries()
        after = module(before, samples(*lists))
        assert after.position is before.position and after.references is before.references
        rows, weight, bias = (
            part.double().tolist()
            for part in (module._shared[0].embeddings, module.projection.weight, module.projection.bias)
        )
        for image, words in enumerate(lists):
            carried = reference(words, 7, assignment)
            assert after.attached(CarriedWords).words[image].tolist() == carried
            for query, word in enumerate(carried):
                expected = before.content[image, query].double().tolist()
                if word >= 0:
                    expected = [
                        value + sum(w * t for w, t in zip(weight[c], rows[word])) + bias[c]
                        for c, value in enumerate(expected)
                    ]
                assert after.content[image, query].tolist() == pytest.approx(expected, abs=1e-5)

    def test_gain_is_of_the_first_weights(self):
        torch.manual_seed(0)
        louder = SemanticPriors(WordBank(micro.vocabulary()), 6, "blocks", gain=5.0).projection
        assert torch.allclose(louder.weight, 5 * priors().projection.weight) and not louder.bias.any()

    def test_more_words_than_queries(self):
        module = priors("interleave").eval()
        few = queries(1, 3)
        assert torch.equal(module(few, samples([4, 1, 3, 0, 2])).content, module(few, samples([4, 1, 3])).content)

    def test_batch_equals_singles(self):
        module, both = priors().eval(), samples([2, 4, 0], [1])
        whole = module(queries(), both).content
        alone = [
            Queries(*(part[i : i + 1] for part in (queries().content, *[queries().position] * 2))) for i in range(2)
        ]
        parts = [module(alone[i], both[i : i + 1]) for i in range(2)]
        assert torch.allclose(whole, torch.cat([part.content for part in parts]), atol=1e-6)

    def test_no_word_at_all_has_a_gradient_of_zero(self):
        """A process whose images have no words waits for no one."""
        module = priors()
        module(queries(), samples([], [])).content.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in module.parameters())

    def test_order_of_the_vocabulary_does_not_matter(self):
        words, order = micro.vocabulary(), [3, 0, 4, 1, 2]
        moved = micro.vocabulary()
        moved = type(words)(
            tuple(words.names[i] for i in order), torch.ones(5, dtype=torch.bool), words.embeddings[order],
            words.teacher, words.templates, tuple(range(5)),
        )  # fmt: skip
        first = priors().eval()(queries(1), samples([4, 1]))
        second = priors(words=moved).eval()(queries(1), samples([order.index(4), order.index(1)]))
        assert torch.equal(first.content, second.content)

    def test_no_novel_word_in_training(self):
        module = priors()
        with pytest.raises(UsageError, match=r"present words \[1, 3\] of 0.jpg \(id 0\) must be below 3"):
            module(queries(1), samples([1, 3]))
        module.eval()(queries(1), samples([1, 3]))
        with pytest.raises(UsageError, match="must be below 5.*another vocabulary"):
            module(queries(1), samples([5]))

    def test_without_words(self):
        with pytest.raises(UsageError, match=r"7.jpg \(id 7\) has no present words attached"):
            priors()(queries(1), [Sample(file_name="7.jpg", image_id=7)])

    def test_unknown_assignment(self):
        with pytest.raises(UsageError, match="blocks or interleave, not 'rows'"):
            priors("rows")
