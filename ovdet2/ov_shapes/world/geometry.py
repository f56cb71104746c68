"""Outlines of the shapes and colour patterns of the textures, in a unit frame without pixels.

The unit frame has x to the right, y down and the shape inside the disc of radius 1 around the origin. Outlines were
chosen so that no shape turns into another under rotation (no diamond beside a square, no oval beside a circle).
"""

from __future__ import annotations

import numpy as np


def outline(shape: str) -> list[tuple[np.ndarray, bool]]:
    """The paint order of a shape's parts.

    Args:
        shape: one of the keys of ``OUTLINES``.

    Returns:
        (points, filled) of each: points is an (N, 2) float array in the unit frame; ``filled`` False cuts a hole into
        the parts before it.
    """
    return OUTLINES[shape]


def pattern(texture: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where the second colour of a texture is painted.

    The period follows the unit frame, so that a 36-pixel object shows as many stripes as a 130-pixel one.

    Args:
        texture: "plain", "striped", "dotted", "checkered" or "split".
        x, y: float arrays of one shape, coordinates in the unit frame.
        rng: draws the pattern's phase and period.

    Returns:
        bool array like ``x``.
    """
    phase_x, phase_y = rng.uniform(0.0, 1.0, 2)
    stretch = rng.uniform(0.9, 1.15)
    angle = rng.uniform(-0.4, 0.4)  # with the object's own tilt: stripes stay mostly upright, as the shapes do
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if texture == "plain":
        return np.zeros(x.shape, dtype=bool)
    if texture == "striped":
        return np.mod(along / (0.56 * stretch) + phase_x, 1.0) < 0.5
    if texture == "checkered":
        cells = np.floor(along / (0.5 * stretch) + phase_x) + np.floor(across / (0.5 * stretch) + phase_y)
        return np.mod(cells, 2.0) < 0.5
    if texture == "dotted":
        pitch = 0.52 * stretch
        dx = np.mod(along / pitch + phase_x, 1.0) - 0.5
        dy = np.mod(across / pitch + phase_y, 1.0) - 0.5
        return dx * dx + dy * dy < 0.30**2
    if texture == "split":
        return along > 0.12 * (phase_x - 0.5)
    raise ValueError(f"unknown texture {texture!r}")


def _circle(radius=1.0, center=(0.0, 0.0), points=48):
    angles = np.linspace(0.0, 2.0 * np.pi, points, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + np.asarray(center)


def _regular(corners, radius):
    return _circle(radius, points=corners)


def _star(points=5, inner=0.42):
    angles = np.pi * np.arange(2 * points) / points
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


def _heart():
    t = np.linspace(0.0, 2.0 * np.pi, 64, endpoint=False)
    x = 16.0 * np.sin(t) ** 3
    y = -(13.0 * np.cos(t) - 5.0 * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)) - 2.5
    return np.stack([x, y], axis=1) / 17.0


def _polygon(*corners):
    return np.asarray(corners, dtype=float)


def _rectangle(x0, y0, x1, y1):
    return _polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


_ARROW = _polygon((-0.95, -0.22), (0.1, -0.22), (0.1, -0.68), (0.98, 0.0), (0.1, 0.68), (0.1, 0.22), (-0.95, 0.22))
_CROWN = _polygon((-0.85, 0.6), (-0.9, -0.62), (-0.4, 0.02), (0.0, -0.8), (0.4, 0.02), (0.9, -0.62), (0.85, 0.6))
_BOLT = _polygon((0.2, -1.0), (-0.62, 0.18), (-0.1, 0.18), (-0.32, 1.0), (0.62, -0.28), (0.08, -0.28), (0.56, -1.0))
_FISH_TAIL = _polygon((0.3, 0.0), (0.98, -0.62), (0.82, 0.0), (0.98, 0.62))
_KEY_BOW = (-0.5, 0.0)

OUTLINES = {
    "circle": [(_circle(0.92), True)],
    "square": [(_rectangle(-0.78, -0.78, 0.78, 0.78), True)],
    "triangle": [(_regular(3, 1.0), True)],
    "star": [(_star(), True)],
    "cross": [(_rectangle(-0.95, -0.3, 0.95, 0.3), True), (_rectangle(-0.3, -0.95, 0.3, 0.95), True)],
    "arrow": [(_ARROW, True)],
    "ring": [(_circle(0.96), True), (_circle(0.5), False)],
    "fish": [(_circle(1.0) * (0.72, 0.5) + (-0.26, 0.0), True), (_FISH_TAIL, True)],
    "crown": [(_CROWN, True)],
    "key": [
        (_circle(0.48, _KEY_BOW), True),
        (_circle(0.2, _KEY_BOW), False),
        (_rectangle(-0.06, -0.15, 0.98, 0.15), True),
        (_rectangle(0.38, 0.1, 0.58, 0.5), True),
        (_rectangle(0.76, 0.1, 0.98, 0.5), True),
    ],
    "bolt": [(_BOLT, True)],
    "moon": [(_circle(0.98), True), (_circle(0.8, (0.5, 0.0)), False)],
    "heart": [(_heart(), True)],
}
