"""Names of concepts in captions: word boundaries, synonyms, and the published rule."""

import pickle

import pytest

from ovdet2.errors import UsageError
from ovdet2.vocabulary.tags import TagMatcher

NAMES = [("car",), ("fire hydrant", "fireplug"), ("dog", "puppy"), ("hot dog",), ("café",)]


@pytest.mark.parametrize("caption, expected", [
    ("a car", (0,)), ("Car.", (0,)), ("two cars", ()), ("a carpet", ()), ("a red car, and a dog", (0, 2)),
    ("a fire hydrant", (1,)), ("a Fire-\nHydrant!", (1,)), ("a fire near a hydrant", ()), ("fireplug", (1,)),
    ("a hot dog", (2, 3)), ("a dog in a cafe\u0301", (2, 4)), ("", ()), ("...", ()),
])  # fmt: skip
def test_words(caption, expected):
    assert TagMatcher(NAMES).find([caption]) == expected


@pytest.mark.parametrize("caption, expected", [
    ("a car", (0,)), ("car", ()), ("Car is red", (0,)), ("a car.", ()), ("a carpet", ()), ("a car, a dog", (2,)),
    ("see a fire hydrant now", (1,)), ("a bow here", (5,)),
])  # fmt: skip
def test_published(caption, expected):
    assert TagMatcher([*NAMES, ("bow_(weapon)",)], "published").find([caption]) == expected


def test_several_captions_are_joined():
    captions = ["a car", "a puppy in a field"]
    assert TagMatcher(NAMES).find(captions) == TagMatcher(NAMES, "published").find(captions) == (0, 2)
    # The published rule joins them by a space; at word boundaries each stands for itself.
    assert TagMatcher(NAMES, "published").find(["a fire", "hydrant is red"]) == (1,)
    assert TagMatcher(NAMES).find(["a fire", "hydrant is red"]) == ()


def test_order_of_concepts_permutes_the_tags():
    order = [3, 0, 4, 2, 1]
    moved = TagMatcher([NAMES[place] for place in order]).find(["a car and a hot dog"])
    assert {order[place] for place in moved} == set(TagMatcher(NAMES).find(["a car and a hot dog"]))


def test_one_concept_and_no_caption():
    assert TagMatcher([("car",)]).find(["a car"]) == (0,) and TagMatcher([("car",)]).find([]) == ()


def test_it_goes_to_loading_processes():
    assert pickle.loads(pickle.dumps(TagMatcher(NAMES))).find(["a car"]) == (0,)


@pytest.mark.parametrize("names, rule, message", [
    (NAMES, "substring", "choose words or published"), ([], "words", "no concepts"), ([("car",), ("...",)], "words", "concept 1"),
    ([("(x)",)], "published", "no letter or digit"),
])  # fmt: skip
def test_lists_that_cannot_be_found_are_refused(names, rule, message):
    with pytest.raises(UsageError, match=message):
        TagMatcher(names, rule)
