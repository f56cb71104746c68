"""Labels in pictures: any words, in any script, that do not cover each other.

Sizes and places are in pixels of the image, (x, y) from its upper left.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from detectron2.utils.visualizer import Visualizer
from matplotlib import colors, font_manager
from matplotlib.text import Text

from ovdet2.report.html_parts import printable

_LONGEST, _LONGEST_WORD = 80, 32  # characters of a label, and of a word in it
_GOLDEN = 0.618034  # successive hues differ by this share of the circle, so that any few of them differ clearly
_NOT_FOR_WORDS = ("Last Resort", "cm", "STIX")  # fonts of mathematics and of placeholders

Box = tuple[float, float, float, float]  # XYXY


def word_colour(number: int) -> tuple[float, float, float]:
    """RGB in [0, 1] of word ``number``: the same in every picture, and light enough for a dark ground."""
    red, green, blue = colors.hsv_to_rgb((number * _GOLDEN % 1.0, 0.65, 1.0)).tolist()
    return red, green, blue


def plain(text: str) -> str:
    """A text for matplotlib, at most 80 characters of one line, in which "$" starts no formula.

    Lone surrogates and control characters, with which matplotlib fails, are replaced.
    """
    text = " ".join(printable(" ".join(text.split())).split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\u2026"
    return text.replace("$", r"\$")


def fonts_for(text: str) -> list[str] | None:
    """Names of installed fonts that together have the characters of a text; None if some are in no font."""
    missing = {character for character in text if not character.isspace()}
    chosen = []
    for name, characters in _fonts():
        if missing & characters:
            chosen.append(name)
            missing -= characters
        if not missing:
            break
    return None if missing else chosen or [_fonts()[0][0]]


def as_drawn(word: str, number: int) -> str:
    """A word as it is drawn: its first 32 characters, or its number, "#3", if no installed font has its characters."""
    if fonts_for(word) is None:
        return f"#{number}"
    return word if len(word) <= _LONGEST_WORD else f"{word[: _LONGEST_WORD - 1]}\u2026"


def font_file(text: str) -> str | None:
    """The file of an installed font, for Pillow, that has all characters of a text; None if no single font has them."""
    fonts = fonts_for(text)
    return None if fonts is None or len(fonts) > 1 else font_manager.findfont(font_manager.FontProperties(family=fonts))


def write_line(
    visualizer: Visualizer, text: str, place: tuple[float, float], rgb: str | tuple[float, ...], size: float = 10
) -> None:
    """Write one line of text, in any script, on a dark ground.

    Args:
        visualizer: of the image, changed.
        text: of any length; only its start is drawn, see :func:`plain`.
        place: (x, y) of its upper left corner, in pixels of the image.
        rgb: colour, in [0, 1], or its name in matplotlib; a dark one is made lighter.
        size: of the font, in points of the picture.
    """
    visualizer.output.ax.text(
        *place, plain(text),
        size=size, family=fonts_for(plain(text)) or "sans-serif", color=_light(rgb), verticalalignment="top",
        horizontalalignment="left", zorder=10, bbox={"facecolor": "black", "alpha": 0.8, "pad": 0.7, "edgecolor": "none"},
    )  # fmt: skip


def _light(colour):
    """A colour that can be read on a dark ground: its largest part is at least 0.8."""
    rgb = np.array(colors.to_rgb(colour)) + 1e-3
    return tuple((rgb * max(1.0, 0.8 / rgb.max())).clip(0, 1))


def draw_labels(
    visualizer: Visualizer, boxes: np.ndarray, labels: Sequence[str], rgb: Sequence[tuple[float, float, float]]
) -> None:
    """Write a label at each box, where it covers no label written before.

    Args:
        visualizer: of the image, changed.
        boxes: array [N, 4], XYXY in pixels of the image, the most important first.
        labels: N texts.
        rgb: N colours, in [0, 1].
    """
    output, taken = visualizer.output, []
    for box, label, colour in zip(boxes.tolist(), labels, rgb):
        text = output.ax.text(
            0, 0, plain(label),
            size=visualizer._default_font_size * output.scale, family=fonts_for(label) or "sans-serif",
            color=colour, verticalalignment="top", horizontalalignment="left", zorder=10,
            bbox={"facecolor": "black", "alpha": 0.75, "pad": 0.7, "edgecolor": "none"},
        )  # fmt: skip
        place = _free_place(box, _size(text, output), taken, (output.width, output.height))
        text.set_position(place[:2])
        taken.append(place)


def _size(text: Text, output) -> tuple[float, float]:
    """(width, height) of a text in pixels of the image."""
    extent = text.get_window_extent(output.canvas.get_renderer())
    return (extent.width + 4) / output.scale, (extent.height + 4) / output.scale


def _free_place(box: Box, size: tuple[float, float], taken: Sequence[Box], image: tuple[float, float]) -> Box:
    """The first place near a box that overlaps no other, else the one that overlaps least."""
    (left, top, right, bottom), (width, height) = box, size
    corners = [(left, top - height), (left, top), (right - width, top - height), (right - width, top)]
    corners += [(left, bottom), (left, bottom - height)]
    corners += [(left, top + step * height) for step in range(1, 1 + int(max(0.0, bottom - top) / height))]
    best, least = None, float("inf")
    for x, y in corners:
        x, y = max(0.0, min(x, image[0] - width)), max(0.0, min(y, image[1] - height))
        place = (x, y, x + width, y + height)
        covered = sum(_overlap(place, other) for other in taken)
        if covered < least:
            best, least = place, covered
        if not covered:
            break
    assert best is not None  # there is more than one corner
    return best


def _overlap(first: Box, second: Box) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, width) * max(0.0, height)


@functools.cache
def _fonts() -> list[tuple[str, frozenset[str]]]:
    """(name, characters) of the installed fonts, matplotlib's default first."""
    default = font_manager.FontProperties(family=["sans-serif"]).get_name()
    files = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if font.style == "normal" and font.weight in (400, "normal") and not font.name.startswith(_NOT_FOR_WORDS)
    }
    names = sorted(files, key=lambda name: (name != default, name))
    return [(name, frozenset(map(chr, font_manager.get_font(files[name]).get_charmap()))) for name in names]
