"""Sources of concept priors without a model: the truth, simulations, chance, somebody else's file."""

import json

import pytest
import torch

from ovdet2.errors import DataError, UsageError
from ovdet2.priors.concept_prior import ConceptPriors, PriorWriter
from ovdet2.priors.from_file import FromFile
from ovdet2.priors.simulated import Chance, NoisyOracle, Oracle
from ovdet2.priors.truth import Truth, truth_of
from tests.priors_cases import TRUTH_SPLIT, WORDS, made_truth


def records_of(truth):
    return [{"image_id": image_id} for image_id in truth]


def written(path, backend, truth, words):
    writer = PriorWriter(words, list(truth))
    for image_id, index, score in backend.lists(records_of(truth), skip=None):
        writer.add(image_id, index, score)
    writer.save(path, "made_up", "0" * 64, backend.source, backend.kind)
    return ConceptPriors(path)


def test_truth_counts_crowds_and_reads_federated_lists():
    record = {"image_id": 5, "annotations": [{"category_id": 1, "iscrowd": 1}, {"category_id": 3, "iscrowd": 0}]}
    assert truth_of([record], TRUTH_SPLIT) == {5: ({1, 3}, None)}
    assert truth_of([record | {"neg_category_ids": [9, 1, 100]}], TRUTH_SPLIT) == {5: ({1, 3}, {4, 0})}


def test_oracle_is_the_truth_in_the_words_asked_for(tmp_path):
    truth = made_truth(30, 5)
    words = ("sofa", "BOAT", "dog", "cat")  # the data set's classes 4, 1 and 0
    priors = written(tmp_path / "p", Oracle(truth, TRUTH_SPLIT.names, words), truth, words)
    assert priors.kind == "ground truth"
    for image_id, (present, _) in truth.items():
        assert set(priors.select(image_id, 1.0, names=TRUTH_SPLIT.names).tolist()) == present & {0, 1, 4}
    with pytest.raises(DataError, match="none of the data set's 5 classes is among the 1 words"):
        Oracle(truth, TRUTH_SPLIT.names, ("sofa",))


@pytest.mark.parametrize("precision, recall", [(0.8, 0.7), (0.5, 1.0), (1.0, 0.4), (0.25, 0.3)])
def test_noisy_oracle_has_the_stated_precision_and_recall(precision, recall):
    """Within four standard errors of the counts it is measured from."""
    names = [f"class {i}" for i in range(65)]
    truth = made_truth(1000, 65)
    backend = NoisyOracle(truth, names, names, precision, recall, seed=3)
    true = false = 0
    for image_id, index, score in backend.lists(records_of(truth), skip=None):
        hits = len(truth[image_id].present & set(index.tolist()))
        true, false = true + hits, false + len(index) - hits
        assert torch.all((score > 0) & (score <= 1))
    present = sum(len(there) for there, _ in truth.values())
    assert backend.kind == "simulation" and backend.source["precision"] == precision
    assert abs(true / present - recall) <= 4 * (recall * (1 - recall) / present) ** 0.5
    listed = true + false
    assert abs(true / listed - precision) <= 4 * (precision * (1 - precision) / listed) ** 0.5


def test_noisy_oracle_draws_by_image_alone():
    truth, names = made_truth(50, 65), [f"class {i}" for i in range(65)]

    def lists(records, seed=1):
        backend = NoisyOracle(truth, names, names, 0.6, 0.7, seed)
        return {i: (a.tolist(), b.tolist()) for i, a, b in backend.lists(records, skip=None)}

    whole = lists(records_of(truth))
    assert lists(records_of(truth)[::-3]).items() <= whole.items()
    assert lists(records_of(truth), seed=2) != whole
    assert all(not whole[i][0] for i, (present, _) in truth.items() if not present)


def test_impossible_simulations_are_refused():
    truth = {1: Truth(frozenset({0, 1, 2}), None)}
    with pytest.raises(UsageError, match="--precision 0.1 is too low for --recall 0.9: an image with 3 of 5 classes"):
        NoisyOracle(truth, TRUTH_SPLIT.names, TRUTH_SPLIT.names, 0.1, 0.9, 0)
    for precision, recall in ((0, 0.5), (0.5, 0), (1.1, 0.5), (0.5, float("nan"))):
        with pytest.raises(UsageError, match="above 0 and at most 1"):
            NoisyOracle(truth, TRUTH_SPLIT.names, TRUTH_SPLIT.names, precision, recall, 0)


def test_chance_draws_every_word_alike(tmp_path):
    truth = made_truth(500, 5)
    priors = written(tmp_path / "p", Chance(WORDS, 0), truth, WORDS)
    counts = torch.bincount(torch.cat([priors.select(i, top=2) for i in truth]), minlength=5)
    assert priors.kind == "control" and counts.sum() == 1000
    assert torch.all((counts - 200).abs() < 4 * (500 * 0.4 * 0.6) ** 0.5)


def from_file(tmp_path, data):
    (tmp_path / "p.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return FromFile(tmp_path / "p.json", ("cat", "red mug", "boat"), (1, 7, 9), ("cat", "car", "Boat"))


def test_file_by_category_id_and_by_word(tmp_path):
    backend = from_file(tmp_path, {"1": [[9, 0.25], ["Red_Mug", 1], [7, 0.5], [80, 0.5]], "3": [], "99": [[1, 0.5]]})
    found = {
        i: dict(zip(index.tolist(), score.tolist()))
        for i, index, score in backend.lists([{"image_id": 3}, {"image_id": 2}, {"image_id": 1}], None)
    }
    assert found == {1: {2: 0.25, 1: 1.0}, 3: {}}
    assert backend.other_images == 1 and backend.other_words == {7: 1, 80: 1}


@pytest.mark.parametrize(
    "data, message",
    [
        ("[", "not valid JSON"),
        ([], "no object"),
        ({"1": {"cat": 0.5}}, "image 1: no list"),
        ({"1": [["cat"]]}, "image 1: .'cat'."),
        ({"1": [["cat", 1.5]]}, "image 1: .'cat', 1.5."),
        ({"1": [["cat", "high"]]}, "image 1"),
        ({"1": [[True, 0.5]]}, "image 1"),
        ({"1": [["cat", float("nan")]]}, "image 1"),
        ({"1": [[1, 0.5], ["Cat", 0.6]]}, "image 1: 'Cat' is listed twice"),
        ({"2": [["cat", 0.5]]}, "none of the 1 images"),
        ({}, "none of the 1 images"),
        ({"1": [["sofa", 0.5], [80, 0.5]]}, "none of its words is among the"),
    ],
)
def test_malformed_files_are_refused(tmp_path, data, message):
    with pytest.raises(DataError, match=message):
        list(from_file(tmp_path, data).lists([{"image_id": 1}], None))
