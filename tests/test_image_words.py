"""The words that a detector is told of an image: from annotations in training, from a prior file at test."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.data.samples import Sample
from ovdet2.errors import CacheError, UsageError
from ovdet2.methods.cckt.prior_words import PriorWords, WordOrder, ordered_words
from ovdet2.methods.cckt.sample import AnnotatedWords
from ovdet2.methods.cckt.semantic_priors import assign_words
from tests.priors_cases import write

NAMES = ("red mug", "car", "cat", "tree", "dog", "boat")


class TestOrder:
    @given(st.permutations(range(len(NAMES))), st.integers(-9, 10**9), st.integers(0, 5))
    @settings(max_examples=40, deadline=None)
    def test_keys_belong_to_words(self, order, image_id, seed):
        keys = WordOrder(NAMES, seed).keys(image_id)
        moved = WordOrder([NAMES[i] for i in order], seed).keys(image_id)
        assert np.array_equal(moved, keys[list(order)]) and len(set(keys.tolist())) == len(NAMES)
        assert np.array_equal(WordOrder((*NAMES, "sky"), seed).keys(image_id)[:-1], keys)
        assert not np.array_equal(WordOrder(NAMES, seed + 1).keys(image_id), keys)
        assert not np.array_equal(WordOrder(NAMES, seed).keys(image_id + 1), keys)

    def test_best_first_and_ties_by_key(self):
        keys = np.array([5, 1, 4, 2, 3], dtype=np.uint64)
        index, score = torch.tensor([3, 0, 2, 4]), torch.tensor([0.9, 0.5, 0.5, 0.5])
        assert ordered_words(index, score, keys).tolist() == [3, 4, 2, 0]
        assert ordered_words(index, score, keys, top=2).tolist() == [3, 0]  # the file's cut
        assert ordered_words(index[:1], score[:1], keys, top=3, fill="random").tolist() == [3, 1, 4]
        assert ordered_words(index[:0], score[:0], keys, top=9, fill="random").tolist() == [1, 3, 4, 2, 0]
        assert ordered_words(index[:0], score[:0], keys, top=9).tolist() == []

    @pytest.mark.parametrize("assignment", ["blocks", "interleave"])
    def test_no_words_mean_rank_depends_on_its_id(self, assignment):
        """An image's first word has slightly better proposals, and in blocks much better ones. Over images in which all
        words exist and are as sure as each other, each word is the first as often: at test by its keys, in training by
        the draw. Without either, word 0 would rank first in every image."""
        images, queries = 3000, 20
        order, train = WordOrder(NAMES), AnnotatedWords(len(NAMES))
        everything, sure = torch.arange(len(NAMES)), torch.ones(len(NAMES))
        np.random.seed(0)
        instances = Instances((9, 9), gt_boxes=Boxes(torch.zeros(len(NAMES), 4)), gt_classes=everything)
        places = assign_words(torch.tensor([len(NAMES)]), queries, assignment)[0]
        ranks = torch.stack([torch.arange(queries)[places == k].double().mean() for k in range(len(NAMES))])
        for words_of in (
            lambda image: ordered_words(everything, sure, order.keys(image)), lambda _: train(Sample(instances=instances))
        ):  # fmt: skip
            total = torch.zeros(len(NAMES), dtype=torch.float64)
            for image in range(images):
                total[words_of(image)] += ranks
            error = ranks.std(unbiased=False) / images**0.5
            assert ((total / images - ranks.mean()).abs() < 4 * error).all(), total / images


class TestPriorWords:
    @pytest.fixture
    def priors(self, tmp_path):
        # words of the file: cat, dog, Red_Mug, tree, car
        return write(tmp_path / "p.safetensors", {1: {0: 0.9, 2: 0.8, 3: 0.6}, 2: {4: 0.3}}, missing=[3])

    def test_by_name_best_first(self, priors):
        words = PriorWords(priors, NAMES, threshold=0.7, top=6)
        assert words(1).tolist() == [2, 0] and words(2).tolist() == []
        assert PriorWords(priors, NAMES, 0.0, 2)(1).tolist() == [2, 0]
        assert PriorWords(priors, NAMES, 0.0, None)(1).tolist() == [2, 0, 3]
        assert words(3).tolist() == []

    def test_fill_depends_on_image_and_seed_alone(self, priors):
        words = PriorWords(priors, NAMES, 0.7, 4, "random")
        first = words(1)
        assert first[:2].tolist() == [2, 0] and len(set(first.tolist())) == 4
        assert len(words(2)) == 4
        assert torch.equal(words(1), first)
        others = {tuple(PriorWords(priors, NAMES, 0.7, 4, "random", seed)(1).tolist()) for seed in range(20)}
        assert len(others) > 3

    @given(order=st.permutations(range(len(NAMES))))
    @settings(max_examples=20, deadline=None)
    def test_order_of_the_vocabulary_and_a_further_word(self, tmp_path_factory, order):
        priors = write(tmp_path_factory.mktemp("p") / "p.safetensors", {1: {0: 0.9, 2: 0.9, 3: 0.9, 4: 0.9}})
        moved = [NAMES[i] for i in order]
        for fill, names in (("random", moved), ("none", [*moved, "sky"])):
            there = PriorWords(priors, NAMES, 0.7, 5, fill)(1)
            assert [names[i] for i in PriorWords(priors, names, 0.7, 5, fill)(1)] == [NAMES[i] for i in there]

    def test_what_is_wrong(self, priors):
        with pytest.raises(CacheError, match="no entry for image id 77: it was made for other images"):
            PriorWords(priors, NAMES)(77)
        with pytest.raises(CacheError, match="has the words cat, dog.*none is in the vocabulary.*sun, moon"):
            PriorWords(priors, ("sun", "moon"))
        with pytest.raises(UsageError, match="fill must be none or random"):
            PriorWords(priors, NAMES, fill="all")


class TestAnnotatedWords:
    def record(self, *classes):
        boxes = Boxes(torch.zeros(len(classes), 4))
        return Sample(instances=Instances((9, 9), gt_boxes=boxes, gt_classes=torch.tensor(classes, dtype=torch.int64)))

    def test_each_once_in_a_drawn_order(self):
        np.random.seed(0)
        drawn = {tuple(AnnotatedWords(4)(self.record(2, 0, 2, 3)).tolist()) for _ in range(60)}
        assert {tuple(sorted(words)) for words in drawn} == {(0, 2, 3)} and len(drawn) == 6
        nothing = AnnotatedWords(4)(self.record())
        assert nothing.tolist() == [] and nothing.dtype == torch.int64

    def test_dropout_and_distractors(self):
        """Shares and bounds; never a novel word."""
        np.random.seed(0)
        words = AnnotatedWords(5, dropout=0.25, distractors=2)
        drawn = [words(self.record(2, 0)).tolist() for _ in range(800)]
        kept = [len({0, 2}.intersection(found)) for found in drawn]
        added = [len(set(found) - {0, 2}) for found in drawn]
        assert np.mean(kept) == pytest.approx(1.5, abs=0.08) and np.mean(added) == pytest.approx(1.0, abs=0.12)
        assert set(added) == {0, 1, 2} and {w for found in drawn for w in found} == {0, 1, 2, 3, 4}
        assert all(len(set(found)) == len(found) for found in drawn)
        assert set(AnnotatedWords(2, distractors=9)(self.record(0)).tolist()) <= {0, 1}

    @pytest.mark.parametrize("options", [{"dropout": 1.0}, {"dropout": -0.1}, {"distractors": -1}])
    def test_out_of_range(self, options):
        with pytest.raises(UsageError, match="PRIOR_DROPOUT"):
            AnnotatedWords(3, **options)
