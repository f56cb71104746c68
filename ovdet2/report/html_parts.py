"""Building blocks of the HTML reports: escaping, tables, bars and line charts as inline SVG.

Charts are written as plain markup rather than drawn by matplotlib so that a style sheet can colour them for light and
dark backgrounds, and labels stay text. Every function returns a string of HTML; arguments called ``*_html`` are HTML
already, all others are plain text or numbers and are escaped here.
"""

import html
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib.resources import files

import numpy as np

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_PLOT = (46, 10, 360, 250)  # left, top, width and height of a chart's area, in units of its view box
LINES = ("novel", "base", "all")  # classes of the style sheet with a colour and a dash pattern each


def printable(value: object) -> str:
    """Any value as a string without what neither UTF-8 nor HTML can hold: lone surrogates and control characters."""
    value = str(value).encode("utf-8", "replace").decode("utf-8")
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", value)


def text(value: object) -> str:
    """Escaped text of any value, made printable."""
    return html.escape(printable(value))


def word(name: str) -> str:
    """A class name, isolated so that right-to-left text does not change the writing direction around it."""
    return f"<bdi>{text(name)}</bdi>"


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A figure, or a dash for None."""
    if value is None:
        return "–"
    # A report read from a file may hold anything: what is no number is shown as text.
    return f"{value:{'+' if sign else ''}.{digits}f}" if isinstance(value, int | float) else text(value)


def css_class(name: object) -> str:
    """A name as a class of an HTML element: only letters, digits, "-" and "_" remain, so it cannot end the attribute."""
    return re.sub(r"[^\w-]", "", str(name), flags=re.ASCII)


def page(title: str, *sections_html: str) -> str:
    """A complete document without links to other files."""
    style = (files("ovdet2") / "assets" / "report" / "report.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n" + "\n".join(sections_html) + "\n</body>\n</html>\n"
    )


def table(
    head: Sequence[str],
    rows_html: Iterable[Sequence[str | tuple[str, str]]],
    numeric: Container[int] = (),
    css: str = "",
    row_css: str = "scroll",
) -> str:
    """A table in a box that scrolls by itself where it is too wide.

    Args:
        head: column titles.
        rows_html: list of lists of cells; a cell is HTML, or a pair (class of the cell, HTML).
        numeric: positions of the columns set flush right.
        css: class of the table.
        row_css: class of the box around it.
    """

    def cell(position, content):
        own, content = content if isinstance(content, tuple) else ("n" if position in numeric else "", content)
        return f'<td class="{own}">{content}</td>' if own else f"<td>{content}</td>"

    titles = "".join(
        f'<th class="n">{text(title)}</th>' if position in numeric else f"<th>{text(title)}</th>"
        for position, title in enumerate(head)
    )
    body = "\n".join(f"<tr>{''.join(cell(*item) for item in enumerate(row))}</tr>" for row in rows_html)
    return (
        f'<div class="{row_css}"><table class="{css}"><thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def facts(pairs_html: Iterable[tuple[str, str]]) -> str:
    """A list of terms with their values: pairs (plain text, HTML)."""
    return f"<dl>{''.join(f'<dt>{text(term)}</dt><dd>{value}</dd>' for term, value in pairs_html)}</dl>"


def bar(value: float | None, largest: float, css: str) -> str:
    """A horizontal bar of ``value`` out of ``largest``; nothing for None."""
    share = 0 if value is None or largest <= 0 else 100 * min(max(value / largest, 0), 1)
    return f'<span class="bar {css_class(css)}" style="width:{share:.1f}%"></span>' if value is not None else ""


def stacked(counts: Mapping[str, int]) -> str:
    """One bar divided by counts, {class of the style sheet without "is-": count}."""
    total = sum(counts.values()) or 1
    parts = "".join(f'<span class="is-{css}" style="width:{100 * n / total:.2f}%"></span>' for css, n in counts.items())
    return f'<div class="stack">{parts}</div>'


def legend(names: Mapping[str, str]) -> str:
    """Coloured keys, {class of the style sheet without "is-": plain text}."""
    keys = "".join(f'<span class="key"><i class="is-{css}"></i>{text(name)}</span>' for css, name in names.items())
    return f"<p>{keys}</p>"


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    labels: tuple[str, str],
    markers: bool = False,
) -> str:
    """Curves over a grid.

    Args:
        lines: {one of :data:`LINES`: [(x, y), ...]}.
        x_range, y_range: (smallest, largest) shown.
        x_ticks, y_ticks: [(value, plain text), ...].
        labels: (of the x axis, of the y axis), plain text.
        markers: dots at the points.
    """
    left, top, width, height = _PLOT

    def at(x, y):
        return (
            left + width * (x - x_range[0]) / (x_range[1] - x_range[0]),
            top + height * (1 - (y - y_range[0]) / (y_range[1] - y_range[0])),
        )

    parts = []
    for value, name in y_ticks:
        y = at(x_range[0], value)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{text(name)}</text>')
    for value, name in x_ticks:
        x = at(value, y_range[0])[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {top}v{height}"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{text(name)}</text>')
    for name, points in lines.items():
        places = [at(*point) for point in points]
        parts.append(f'<path class="curve {css_class(name)}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        if markers:
            parts += [f'<circle class="{css_class(name)}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places]
    middle = top + height / 2
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 34}" text-anchor="middle">{text(labels[0])}</text>')
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{text(labels[1])}</text>'
    )
    return f'<svg viewBox="0 0 {left + width + 14} {top + height + 42}" role="img">{"".join(parts)}</svg>'


def profile(values: Sequence[float], subsets: Sequence[str], largest: float = 100) -> str:
    """One thin upright bar for each class, in the order given, coloured by subset.

    Args:
        values: list of K floats, at least 0.
        subsets: list of K names, "novel" or "base".
        largest: value of a bar of full height.
    """
    left, top, width, height = 46, 10, 900, 170
    step = width / max(len(values), 1)
    thick = 0.85 * step
    parts = []
    for tick in np.linspace(0, largest, 5):
        y = top + height * (1 - tick / largest)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for subset in dict.fromkeys(subsets):
        path = "".join(
            f"M{left + step * i:.1f} {top + height}h{thick:.2f}v-{height * value / largest:.1f}h-{thick:.2f}z"
            for i, value in enumerate(values)
            if subsets[i] == subset
        )
        parts.append(f'<path class="fill {css_class(subset)}" d="{path}"/>')
    return f'<svg viewBox="0 0 {left + width + 10} {top + height + 10}" role="img">{"".join(parts)}</svg>'
