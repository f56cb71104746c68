"""Records of small files for the tests of the zoo."""

import json

import torch

from ovdet2.zoo import records

# Two tensors, in the structure "tiny".
SHAPES = {"network.a": (2, 3), "network.b": (4,)}
ENTRY = {
    "title": "Two tensors",
    "sources": [{"url": "https://example.org/files/tiny.pth", "by_hand": False, "bytes": None, "sha256": None}],
    "config": "coco/deformable_detr_r50.yaml",
    "overrides": [],
    "converter": "tests.zoo_cases:converted",
    "options": {"prefix": "network."},
    "structure": "tiny",
    "teacher": None,
    "templates": None,
    "licence": {"code": "MIT", "weights": "MIT", "data": "own", "non_commercial": False},
    "figures": [{"metric": "AP", "value": "1.0", "source": "a page"}],
    "training": {"boxes": "some", "image_labels": "none", "captions": "none", "novel": "none"},
}


def tiny_weights(value=1.0):
    """The weights of the published file."""
    return {"a": torch.full((2, 3), value), "b": torch.arange(4.0)}


def converted(weights, cfg, *, prefix):
    """A converter: prepend a prefix, and add a vocabulary, which is not part of the structure."""
    assert cfg.MODEL.META_ARCHITECTURE == "OpenVocabularyDeformableDETR"
    return {f"{prefix}{name}": value for name, value in weights.items()} | {"vocabulary.words": torch.zeros(3)}


def write_records(folder, **changes):
    """A folder of assets with the record "tiny" and its structure; ``changes`` replace entries. Returns the json's path."""
    (folder / "structures").mkdir(parents=True, exist_ok=True)
    (folder / "structures" / "tiny.txt").write_text(records.structure_text(SHAPES))
    path = folder / "tiny.json"
    path.write_text(json.dumps({"schema": records.SCHEMA, "records": {"tiny": {**ENTRY, **changes}}}))
    return path


def source(url, **changes):
    """A source without pins."""
    return {"url": url, "by_hand": False, "bytes": None, "sha256": None, **changes}
