"""Concept priors: the format and its reader."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ovdet2.errors import CacheError, UsageError
from ovdet2.io.files import write_safetensors
from ovdet2.priors.concept_prior import SCHEMA, ConceptPriors, PriorWriter, content_sha256
from tests.priors_cases import WORDS, write


def reference(scores, top):
    """What the format says of {word index: score}, in plain Python."""
    ordered = sorted((-float(np.float32(score)), index) for index, score in scores.items())
    return [(index, -score) for score, index in ordered if score < 0][:top]


# Few different values, so that ties are common.
_SCORES = st.dictionaries(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.7, 0.9, 1.0]), max_size=5)
_LISTS = st.dictionaries(st.integers(0, 10**12), _SCORES, min_size=1, max_size=6)


@given(_LISTS, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_round_trip_and_order(tmp_path_factory, lists, top):
    path = tmp_path_factory.mktemp("prior") / "p.safetensors"
    priors = write(path, lists, top=top)
    assert priors.words == WORDS and len(priors) == len(lists) and not priors.missing
    for image_id, scores in lists.items():
        index, score = priors.scores(image_id)
        assert list(zip(index.tolist(), score.tolist())) == reference(scores, top)
        assert index.dtype == torch.int64 and score.dtype == torch.float32
    assert priors.manifest["entries"] == sum(len(reference(scores, top)) for scores in lists.values())


@given(_SCORES, st.permutations(range(5)), st.sampled_from([0.0, 0.25, 0.7, 0.95]), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_selection(tmp_path_factory, scores, order, rho, top):
    """A higher threshold or a shorter list selects a prefix; another order of the caller's words selects the same."""
    priors = write(tmp_path_factory.mktemp("prior") / "p.safetensors", {7: scores})
    found = priors.select(7, rho, top).tolist()
    assert found == [index for index, score in reference(scores, 5) if score >= np.float32(rho)][:top]
    assert priors.select(7, rho + 0.04, top).tolist() == found[: len(priors.select(7, rho + 0.04, top))]
    names = [WORDS[i] for i in order]
    assert [order[i] for i in priors.select(7, rho, top, names).tolist()] == found


def test_dense_scores_equal_listed_ones(tmp_path):
    scores = torch.rand(3000, generator=torch.Generator().manual_seed(0)).mul(200).round().div(200)  # many ties
    writer = PriorWriter([f"word {i}" for i in range(3000)], [1], top=100)
    writer.add(1, None, scores)
    writer.save(tmp_path / "p", "made_up", "0" * 64, {"backend": "test"}, "prediction")
    index, score = ConceptPriors(tmp_path / "p").scores(1)
    assert list(zip(index.tolist(), score.tolist())) == reference(dict(enumerate(scores.tolist())), 100)


@pytest.mark.parametrize(
    "image_id, index, score",
    [
        (9, [0], [0.5]),
        (2, [0], [0.5]),  # a second time
        (1, [5], [0.5]),
        (1, [-1], [0.5]),
        (1, [0, 0], [0.5, 0.6]),
        (1, [0, 1], [0.5]),
        (1, [0], [1.5]),
        (1, [0], [float("nan")]),
    ],
)
def test_writer_refuses(image_id, index, score):
    writer = PriorWriter(WORDS, [1, 2])
    writer.add(2, torch.tensor([0]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match=f"image id {image_id}|{image_id} are not"):
        writer.add(image_id, torch.tensor(index), torch.tensor(score))


def test_threshold_is_compared_as_scores_are_stored(tmp_path):
    assert write(tmp_path / "p", {1: {0: 0.7}}).select(1, threshold=0.7).tolist() == [0]  # float32(0.7) < 0.7


def test_words_of_another_vocabulary(tmp_path, caplog):
    priors = write(tmp_path / "p", {1: {0: 0.9, 1: 0.8, 2: 0.7, 3: 0.6}})
    names = ("tree", "red mug.", "boat")
    assert priors.select(1, top=1, names=names).tolist() == [1]  # top L counts the caller's words alone
    assert priors.select(1, names=names).tolist() == [1, 0]
    assert priors.coverage(names) == (["Red_Mug", "tree"], ["cat", "dog", "car"], ["boat"])
    priors.select(1, names=list(names))
    said = [r.getMessage() for r in caplog.records if r.name == "ovdet2.priors.concept_prior"]
    assert len(said) == 1 and "3 of its 5 words are not in the vocabulary" in said[0] and "for 1 of the" in said[0]
    with pytest.raises(UsageError, match="twice"):
        priors.select(1, names=("red mug", "red_mug"))


def test_missing_and_empty_and_unknown_images(tmp_path):
    priors = write(tmp_path / "p", {1: {0: 0.9}, 2: {}}, missing=[3, 4])
    assert priors.missing == {3, 4} and "2 missing" in str(priors) and len(priors) == 2
    assert all(len(part) == 0 for image_id in (2, 3) for part in priors.scores(image_id))
    assert len(priors.select(3, names=WORDS)) == 0
    with pytest.raises(CacheError, match="no entry for image id 5: it was made for other images"):
        priors.scores(5)


def test_a_prior_without_entries(tmp_path):
    assert len(write(tmp_path / "p", {1: {}}).select(1)) == 0
    nobody = write(tmp_path / "q", {}, missing=[1])
    assert len(nobody) == 0 and len(nobody.select(1)) == 0


def test_simulations_say_so(tmp_path):
    assert ": SIMULATION, backend test" in str(write(tmp_path / "p", {1: {}}, kind="simulation"))
    with pytest.raises(ValueError, match="kind of a prior"):
        write(tmp_path / "p", {1: {}}, kind="guess")


def _select(priors, image_id):
    return priors.select(image_id, 0.3, 2).tolist()


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_reader_travels_to_workers(tmp_path, start):
    priors = write(tmp_path / "p", {1: {0: 0.9, 3: 0.4, 4: 0.8}, 2: {2: 0.5}})
    assert _select(priors, 1) == [0, 4]  # the map is open before the worker starts
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.starmap(_select, [(priors, 1), (priors, 2)]) == [[0, 4], [2]]
    assert _select(pickle.loads(pickle.dumps(priors)), 2) == [2]


def _tensors(**changes):
    tensors = {
        "image_ids": torch.tensor([1, 2]),
        "offsets": torch.tensor([0, 1, 2]),
        "word_index": torch.tensor([0, 4], dtype=torch.int32),
        "score": torch.tensor([0.5, 0.25]),
    }
    return tensors | changes


def _write_raw(path, tensors, **changes):
    manifest = {
        "schema": SCHEMA,
        "words": list(WORDS),
        "kind": "prediction",
        "source": {},
        "dataset": "made_up",
        "dataset_sha256": "0" * 64,
        "missing_image_ids": [],
        "content_sha256": content_sha256(tensors, WORDS),
    }
    write_safetensors(path, tensors, {k: v for k, v in (manifest | changes).items() if v is not None})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"word_index": torch.tensor([0, 5], dtype=torch.int32)}, "out of range"),
        ({"score": torch.tensor([0.5, float("nan")])}, "out of range"),
        ({"offsets": torch.tensor([0, 2, 1])}, "2 images, 3 offsets"),
        ({"offsets": torch.tensor([0, 3, 2])}, "do not ascend"),
        ({"image_ids": torch.tensor([2, 1])}, "do not ascend"),
        ({"score": torch.tensor([0.5])}, "2 words and 1 scores"),
        ({"score": torch.tensor([0.5, 0.25]).double()}, "float64"),
    ],
)
def test_inconsistent_tensors_are_refused(tmp_path, changes, message):
    _write_raw(tmp_path / "good", _tensors())
    assert _select(ConceptPriors(tmp_path / "good"), 1) == [0]
    _write_raw(tmp_path / "p", _tensors(**changes))
    with pytest.raises(CacheError, match=f"damaged.*{message}.*ovdet2 prior again"):
        ConceptPriors(tmp_path / "p")


def test_damaged_files_are_refused(tmp_path):
    with pytest.raises(CacheError, match="does not exist: build it with ovdet2 prior"):
        ConceptPriors(tmp_path / "none")
    write(tmp_path / "p", {1: {0: 0.9, 1: 0.8}})
    whole = (tmp_path / "p").read_bytes()
    for end in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(CacheError, match="not a complete concept prior"):
            ConceptPriors(tmp_path / "cut")
    for place in range(len(whole) - 40, len(whole)):  # any bit of the tensors
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "flipped").write_bytes(flipped)
        with pytest.raises(CacheError, match="is damaged"):
            ConceptPriors(tmp_path / "flipped")
    edited = whole.replace(b'\\"cat\\"', b'\\"cow\\"')
    assert edited != whole
    (tmp_path / "edited").write_bytes(edited)
    with pytest.raises(CacheError, match="SHA-256"):
        ConceptPriors(tmp_path / "edited")


def test_other_schema_and_lacking_parts(tmp_path):
    _write_raw(tmp_path / "p", _tensors(), schema="ovdet2/concept-prior/2")
    with pytest.raises(
        CacheError, match="schema 'ovdet2/concept-prior/2', this version reads 'ovdet2/concept-prior/1'"
    ):
        ConceptPriors(tmp_path / "p")
    _write_raw(tmp_path / "p", _tensors(), words=None)
    with pytest.raises(CacheError, match="has no words"):
        ConceptPriors(tmp_path / "p")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "foreign"))
    with pytest.raises(CacheError, match="schema None"):
        ConceptPriors(tmp_path / "foreign")
