"""Every picture that holds words takes any word: formulas, other scripts, control characters, any length."""

import io
from base64 import b64decode
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation.columns import Truth
from ovdet2.programs import inspect_cache
from ovdet2.report import labels
from ovdet2.report.detections import draw
from ovdet2.report.html_report import image_section
from ovdet2.report.labels import font_file, plain
from ovdet2.report.pictures import Pictures, picture
from ovdet2.report.query_pictures import QueryView, draw_query
from ovdet2.report.score_maps import draw_detections, draw_scores

WORDS = {
    "formula": "$5$ bill",
    "broken formula": "$$ sign",
    "wrong formula": "$x^$",
    "backslash": r"\frac{a}{b}",
    "long": "x" * 500,
    "lines": "a\nb\r\nc\td",
    "control": "a\x07b\x00c",
    "surrogate": "dog\ud800",
    "Greek": "κύκλος",
    "Chinese": "日本の猫",
    "private": "\ue123",
    "right to left": "قطة",
    "emoji": "\U0001f984",
    "tag": "<b>&amp;</b>",
    "number": "#3",
}
IMAGE = np.full((60, 80, 3), 90, np.uint8)


def detections():
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5, 40, 40], [30, 10, 70, 50]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.4]), torch.tensor([1, 0])
    return instances


def of_a_report(word, folder):
    Image.fromarray(IMAGE).save(folder / "image.png")
    uri = picture(folder / "image.png", detections().pred_boxes.tensor.numpy(), [word, word], ["novel", "base"])
    return np.asarray(Image.open(io.BytesIO(b64decode(uri.split(",")[1]))))


def of_a_query(word, folder):
    view = QueryView(
        torch.tensor([[5.0, 5, 40, 40]]), torch.tensor([20.0, 30]), torch.full((1, 2, 1, 2), 30.0), torch.ones(1, 2, 1)
    )
    return draw_query(view, IMAGE, f"query 3: {word} 0.50")


def of_a_cache(word, folder):
    vocabulary = SimpleNamespace(names=["cat", word])
    drawn = [inspect_cache._drawn(vocabulary, index) for index in (0, 1)]
    return np.asarray(inspect_cache.sheet([(torch.zeros(2, 1, 3, 32, 32, dtype=torch.uint8), drawn)]))


PICTURES = {
    "predict": lambda word, folder: draw(IMAGE, detections(), ["cat", word]),
    "report": of_a_report,
    "query": of_a_query,
    "score map": lambda word, folder: draw_scores(IMAGE, torch.ones(60, 80), 0.5, word),
    "layers": lambda word, folder: draw_detections(IMAGE, detections(), ["cat", word], word),
    "cache": of_a_cache,
}


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("kind", PICTURES)
def test_any_word_is_drawn_in_a_picture_of_the_usual_size(kind, word, tmp_path):
    usual, found = PICTURES[kind]("dog", tmp_path), PICTURES[kind](WORDS[word], tmp_path)
    assert found.shape == usual.shape and found.dtype == np.uint8
    assert not np.array_equal(found, PICTURES[kind]("another", tmp_path))


def test_formulas_are_drawn_as_they_are(tmp_path):
    """A formula would be drawn without its signs: the pictures of "5 bill" and "$5$ bill" must differ."""
    for kind, drawn in PICTURES.items():
        assert not np.array_equal(drawn("$5$ bill", tmp_path), drawn("5 bill", tmp_path)), kind


def test_plain_texts_have_no_odd_character():
    for word in WORDS.values():
        text = plain(word)
        assert len(text) <= 2 * 80 and "\n" not in text and text.encode("utf-8")
        assert not any(ord(character) < 32 for character in text)


def test_words_of_a_report_without_a_font_are_numbers_with_a_legend(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_fonts", lambda: [("DejaVu Sans", frozenset(map(chr, range(32, 128))))])
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    split = Split("made up", base=((1, "cat"), (7, "<猫>")), novel=((9, "κύκλος"),))
    truth = Truth.__new__(Truth)
    for name, value in {
        "images": {1: {"file_name": str(tmp_path / "image.png")}},
        "image_ids": np.array([1, 1]),
        "crowd": np.zeros(2, bool),
        "category_ids": np.array([1, 7]),
        "boxes_xyxy": np.array([[5.0, 5, 40, 40], [30, 10, 70, 50]]),
    }.items():
        object.__setattr__(truth, name, value)
    pictures = Pictures(truth, None, split, SimpleNamespace(outcome=None))
    pictures.truth(1)
    assert pictures.numbered == {"#7": "<猫>"}
    page = image_section(pictures, {}, 1)
    assert "No installed font has the characters of: #7 <bdi>&lt;猫&gt;</bdi>." in page


def test_words_of_a_cache_without_a_font_are_numbers(monkeypatch):
    vocabulary = SimpleNamespace(names=["cat", "\ue123", "a\n b", "#0"])
    assert [inspect_cache._drawn(vocabulary, index) for index in range(4)] == ["cat", "#1", "a b", "#3"]
    assert font_file("cat").endswith((".ttf", ".otf", ".ttc")) and font_file("\ue123") is None
