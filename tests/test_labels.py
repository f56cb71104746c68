"""Labels in pictures: any text as it is, in any script, none over another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer

from ovdet2.programs.predict import to_record
from ovdet2.report import labels
from ovdet2.report.detections import draw
from ovdet2.report.labels import as_drawn, draw_labels, fonts_for, plain, word_colour


def texts_of(boxes, words, size=(300, 400)):
    """The matplotlib texts of some labels in an image."""
    visualizer = Visualizer(np.zeros((*size, 3), np.uint8), scale=2.0)
    draw_labels(visualizer, np.array(boxes, dtype=float), words, [(1.0, 0.0, 0.0)] * len(words))
    visualizer.output.canvas.draw()
    return visualizer, visualizer.output.ax.texts


@pytest.mark.parametrize("word", ("$$ sign", "$5$ bill", r"\$5", "$x^$", "a $ b", "100%", "<b>", "{}", "a_b^c"))
def test_any_text_is_drawn_as_it_is(word):
    """In matplotlib "$5$ bill" is a formula, and "$x^$" an error."""
    from matplotlib import cbook

    text = plain(word)
    assert not cbook.is_math_text(text)
    _, [drawn] = texts_of([[10, 10, 100, 100]], [word])
    assert drawn._preprocess_math(drawn.get_text())[0] == word


def test_long_and_broken_lines_are_bounded():
    assert plain("a\nb\t c") == "a b c"
    assert len(plain("x" * 500)) == 80 and len(as_drawn("x" * 500, 0)) == 32 and as_drawn("x" * 32, 0) == "x" * 32


def test_scripts(monkeypatch):
    fonts = [("Latin", frozenset("abc")), ("Greek", frozenset("αβγa"))]
    monkeypatch.setattr(labels, "_fonts", lambda: fonts)
    assert fonts_for("a b") == ["Latin"] and fonts_for("aβ") == ["Latin", "Greek"] and fonts_for("") == ["Latin"]
    assert fonts_for("a猫") is None
    assert as_drawn("aβ", 4) == "aβ" and as_drawn("a猫", 4) == "#4"


def test_the_fonts_of_this_machine():
    assert fonts_for("cat ёлка κύκλος")[0] == labels._fonts()[0][0]
    assert not any(name.startswith("Last Resort") for name, _ in labels._fonts())


@pytest.mark.parametrize("count", (1, 2, 5, 8))
def test_no_label_covers_another_or_leaves_the_image(count):
    boxes = [[50, 50, 250, 250]] * count
    visualizer, texts = texts_of(boxes, [f"word {number} 90%" for number in range(count)])
    extents = [text.get_window_extent() for text in texts]
    for number, extent in enumerate(extents):
        assert extent.x0 >= 0 and extent.y0 >= 0
        assert extent.x1 <= 2 * 400 and extent.y1 <= 2 * 300
        assert not any(extent.overlaps(other) for other in extents[:number])


def test_a_crowded_image_still_has_every_label():
    _, texts = texts_of([[0, 0, 40, 40]] * 60, ["crowded"] * 60, size=(40, 40))
    assert len(texts) == 60


def test_colours_of_words_are_fixed_and_differ():
    assert word_colour(3) == word_colour(3)
    shades = np.array([word_colour(number) for number in range(10)])
    distances = np.abs(shades[:, None] - shades[None]).sum(-1) + 9 * np.eye(10)
    assert distances.min() > 0.1 and shades.max(axis=1).min() == 1.0  # light enough for the dark ground of a label


def detections(priors=None):
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5, 40, 40], [30, 10, 70, 50]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.4]), torch.tensor([1, 0])
    if priors is not None:
        instances.prior_words = torch.tensor(priors)
    return instances


def test_pictures(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ovdet2.report.detections.draw_labels", lambda picture, boxes, texts, rgb: seen.append((boxes, texts, rgb))
    )
    image = np.full((60, 80, 3), 90, np.uint8)
    picture = draw(image, detections(), ["cat", "$ bill"])
    assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8 and len(np.unique(picture)) > 2
    assert seen[0][1] == ["$ bill 90%", "cat 40%"] and seen[0][2] == [word_colour(1), word_colour(0)]
    draw(image, detections([0, -1]), ["cat", "dog"])
    assert seen[1][1] == ["dog 90% <- cat", "cat 40% <- no prior"]
    assert (draw(image, detections()[:0], ["cat"]) == 90).all()


@pytest.mark.parametrize("colour", ["k", "w", "b", (0.28, 0.2, 0.48), (0.0, 0.0, 0.3)])
def test_a_line_can_be_read_on_its_dark_ground(colour):
    visualizer = Visualizer(np.zeros((100, 200, 3), np.uint8), scale=2.0)
    labels.write_line(visualizer, "$5$ bill", (10, 20), colour)
    [text] = visualizer.output.ax.texts
    assert max(text.get_color()) >= 0.8 and text.get_position() == (10, 20)
    picture = visualizer.get_output().get_image()
    ys, xs = np.nonzero(picture.max(axis=2) > 150)
    assert 15 < xs.min() < 40 and 35 < ys.min() < 70  # the upper left of the text, in pixels of the scaled picture


class TestMasks:
    """Of a detector that has them."""

    def found(self):
        masks = torch.zeros(2, 480, 640, dtype=torch.bool)
        masks[0, 100:300, 50:250] = True
        masks[0, 150:200, 100:150] = False  # a hole
        return Instances(
            (480, 640), pred_boxes=Boxes(torch.tensor([[50.0, 100, 250, 300], [400, 400, 410, 410]])),
            scores=torch.tensor([0.9, 0.8]), pred_classes=torch.tensor([1, 0]), pred_masks=masks,
        )  # fmt: skip

    def test_are_drawn_in_the_colour_of_the_word(self):
        picture = draw(np.zeros((480, 640, 3), np.uint8), self.found(), ["cat", "dog"])
        inside, hole, outside = picture[250, 200], picture[175, 125], picture[400, 200]
        assert np.allclose(inside / inside.max(), np.array(word_colour(1)) / max(word_colour(1)), atol=0.05)
        assert 60 < inside.max() < 130  # the image is seen through it
        assert hole.max() == 0 and outside.max() == 0

    def test_are_written_as_run_lengths(self):
        from pycocotools import mask

        found = self.found()
        first, empty = to_record(Path("a.jpg"), found, ["cat", "dog"])["detections"]
        assert np.array_equal(mask.decode(first["segmentation"]), found.pred_masks[0].numpy())
        assert first["segmentation"]["size"] == [480, 640] and isinstance(first["segmentation"]["counts"], str)
        assert mask.decode(empty["segmentation"]).sum() == 0
