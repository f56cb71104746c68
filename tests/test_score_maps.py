"""Discriminative scores: norms of the part that is no padding, where they are drawn, and the program."""

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet2.config import load_config
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import UsageError
from ovdet2.modeling.build import build_teacher
from ovdet2.programs import draw_score_maps as tool
from ovdet2.report.score_maps import SIDE, discriminative_scores, draw_scores, joint_scores
from ovdet2.vocabulary import Vocabulary
from tests.detr_cases import SHAPES, VALID, memory


def test_scores_are_norms_without_padding():
    encoded = memory(padding=1e6)
    for image in range(2):
        for level, found in enumerate(discriminative_scores(encoded, image)):
            rows, columns = VALID[image][level]
            tokens = encoded.tokens[image].split([h * w for h, w in SHAPES])[level].unflatten(0, SHAPES[level])
            wanted = tokens[:rows, :columns].square().sum(dim=2).sqrt().float()
            torch.testing.assert_close(found, wanted)


def test_levels_are_scaled_resized_and_averaged():
    maps = [torch.tensor([[1.0, 3.0]]), torch.tensor([[10.0], [20.0]]), torch.full((2, 2), 7.0)]
    mean, levels = joint_scores(maps, (40, 80))
    assert levels.shape == (3, 40, 80) and levels[2].sum() == 0
    corners = torch.tensor([[0, 0, 0.0], [1, 0, 0.5], [0, 1, 0.5], [1, 1, 1.0]])  # of level 1, of level 2, of the mean
    for (y, x), wanted in zip(((0, 0), (0, -1), (-1, 0), (-1, -1)), corners):
        torch.testing.assert_close(torch.stack([levels[0, y, x], levels[1, y, x], mean[y, x]]), wanted)


def test_places_below_the_threshold_stay_grey():
    image = np.full((60, 120, 3), (200, 100, 0), np.uint8)
    scores = torch.zeros(60, 120)
    scores[:, 60:] = 0.9
    drawn = draw_scores(image, scores).astype(int)
    assert drawn.shape == (SIDE // 2, SIDE, 3)
    left, right = drawn[120, 60], drawn[120, 420]
    assert (left == 100).all() and right[0] - right[2] > 60


def test_the_program_draws_scores_and_layers(tmp_path):
    small = ["MODEL.DETR.DIM", "32", "MODEL.DETR.NUM_QUERIES", "8", "MODEL.VOCABULARY.TEMPLATES", "single"]
    small += ["MODEL.DEVICE", "cpu"]
    config = "ovshapes/clip_detr_both_text_r18.yaml"
    words = Vocabulary.build(
        ["red star", "moon"], build_teacher(load_config(config, small)), "single", [True, False]
    )  # fmt: skip
    model = tool.OpenVocabularyDeformableDETR(load_config(config, small), vocabulary=words)
    AtomicCheckpointer(model, str(tmp_path)).save("model")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    arguments = ["--config-file", config, "--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out")]
    arguments += ["--confidence", "0.0", *small, "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    scores, layers = tool.main(arguments)
    assert (scores.name, layers.name) == ("a_scores.png", "a_layers.png")
    assert Image.open(scores).size == (4 * SIDE, SIDE * 60 // 100)  # of three levels
    assert Image.open(layers).size == (2 * SIDE, SIDE * 60 // 100)
    with pytest.raises(UsageError, match="no Deformable DETR"):
        tool.main(["--config-file", "ovshapes/vild_text_r18.yaml", *arguments[2:]])
