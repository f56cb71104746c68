"""A made-up teacher of words, the tool run with it, and a small LVIS-like data set."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from build_vocabulary import main

from ovdet2.io.files import write_json
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.templates import render
from tests import micro

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CLIP_TEXT = SHARED / "clip_text"
DIM = 16
STATED = ("--architecture", "ViT-B-32", "--pretrained", "openai", "--templates", "a {name}")

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")

LVIS_LIKE = [
    {"id": 9, "name": "bull", "synonyms": ["horned_cow"], "frequency": "r"},
    {"id": 4, "name": "sofa", "synonyms": ["sofa", "couch"], "frequency": "f"},
    {"id": 2, "name": "cat", "synonyms": ["cat"], "frequency": "c"},
]


def text_row(text):
    """A made-up unit embedding of a text, float64 [DIM]."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    row = np.random.default_rng(seed).normal(size=DIM)
    return row / np.linalg.norm(row)


class HashTeacher:
    """Stands in for CLIP: every text has an embedding of its own, whatever it is encoded with."""

    fingerprint = micro.TEACHER

    def encode_text(self, texts):
        return torch.tensor(np.stack([text_row(text) for text in texts]), dtype=torch.float32)


def reference(groups, templates):
    """Float64 rows [K, DIM]: mean over names of the normalised mean over prompts, normalised."""
    rows = []
    for names in groups:
        means = [np.mean([text_row(text) for text in render(name, templates)], axis=0) for name in names]
        mean = np.mean([row / np.linalg.norm(row) for row in means], axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


def tool_runner(monkeypatch, tmp_path, capsys):
    """Callable: run the tool with a made-up teacher; returns (vocabulary read back, what was printed)."""
    monkeypatch.setattr(Teacher, "load", lambda *arguments: HashTeacher())

    def run(*arguments):
        teacher = ("--architecture", "micro", "--pretrained", "test")
        main([*map(str, (*teacher, "--output", tmp_path / "v.safetensors", *arguments))])
        return Vocabulary.load(tmp_path / "v.safetensors"), capsys.readouterr().out

    return run


def write_lvis(monkeypatch, folder):
    """Make a folder that of the data sets, with an ov_lvis_val of three classes."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    (folder / "coco").mkdir()
    (folder / "lvis").mkdir()
    write_json(folder / "lvis" / "lvis_v1_val.json", {"images": [], "annotations": [], "categories": LVIS_LIKE})
