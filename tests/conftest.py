"""Fixtures of several files."""

import json
import uuid

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.data.datasets.register import register_dataset
from ovdet2.evaluation import OpenVocabularyEvaluator
from tests.evaluation_sets import SPLIT


@pytest.fixture
def registered(tmp_path):
    """Registers a json for the time of a test and gives its name; further arguments are register_dataset's."""
    names = []

    def register(data, split=SPLIT, **options):
        name = f"test_{uuid.uuid4().hex}"
        names.append(name)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        register_dataset(name, path, tmp_path, split, **options)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def make_evaluator(registered, tmp_path):
    """Registers a json and gives its evaluator, reset; further arguments are the evaluator's."""

    def make(data, split=SPLIT, folder="out", metric="ov_coco", masks=False, **options):
        evaluator = OpenVocabularyEvaluator(
            registered(data, split, metric=metric, masks=masks), tmp_path / folder, **options
        )
        evaluator.reset()
        return evaluator

    return make
