"""Precision and recall of concept priors over base and novel classes."""

import itertools
import random

import pytest

from ovdet2.priors.quality import as_table, quality
from ovdet2.priors.truth import Truth
from tests.priors_cases import TRUTH_SPLIT, made_truth, write


def brute_force(priors, truth, members, rho, top):
    hits = judged = selected = total = 0
    for image_id, (present, absent) in truth.items():
        total += len(present & members)
        chosen = set(priors.select(image_id, rho, top, TRUTH_SPLIT.names).tolist()) & members
        hits += len(chosen & present)
        selected += len(chosen)
        judged += len(chosen) if absent is None else len(chosen & (present | absent))
    return (hits / judged if judged else None, hits / total) if total else (None, None)


@pytest.mark.parametrize("federated", [False, True])
def test_quality(tmp_path, federated):
    rng = random.Random(1)
    truth = made_truth(40, 5)
    if federated:
        truth = {i: Truth(there, frozenset(rng.sample(range(5), 2)) - there) for i, (there, _) in truth.items()}
    words = ("boat", "sofa", "tree", "cat", "dog")  # without "car"; "sofa" is judged nowhere
    lists = {i: {w: rng.random() for w in range(5)} for i in list(truth)[:-3]}
    priors = write(tmp_path / "p", lists, words, missing=list(truth)[-3:])
    rhos, tops = [0.0, 0.5, 0.99], [1, 3, None]
    rows = quality(priors, truth, TRUTH_SPLIT, rhos, tops)
    assert [(row["rho"], row["top"]) for row in rows] == list(itertools.product(rhos, tops))
    for row in rows:
        for name, members in (("base", {0, 1, 2}), ("novel", {3, 4}), ("all", {0, 1, 2, 3, 4})):
            assert row[name] == pytest.approx(brute_force(priors, truth, members, row["rho"], row["top"]))
    assert len(as_table(rows).splitlines()) == 10


def test_classes_without_annotations_are_not_judged(tmp_path):
    truth = {1: Truth(frozenset({0}), None), 2: Truth(frozenset({1, 2}), None)}
    priors = write(tmp_path / "p", {1: {0: 0.9, 4: 0.8}, 2: {4: 0.7}}, ("cat", "dog", "tree", "boat", "car"))
    (row,) = quality(priors, truth, TRUTH_SPLIT, [0.0], [None])
    assert row["novel"] == (None, None) and row["base"] == (1.0, 1 / 3) and row["words"] == 1.5
    assert as_table([row]).splitlines()[1].split() == ["0.00", "all", "1.5", "100.0", "33.3", "-", "-", "33.3", "33.3"]
