"""Drawing of OV-Shapes scenes with numpy and Pillow: backgrounds, clutter of no class, and objects.

Legend: H, W image height and width in pixels; P side of an object's patch in pixels; S supersampling factor.
Images are uint8 (H, W, 3) RGB. Boxes are XYXY absolute pixels, x1 and y1 exclusive.
Every function draws all its randomness from the Generator it is given, so that a scene is a pure function of its seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ovdet2.ov_shapes.world.geometry import outline, pattern

# Colour does not decide the class, and captions may name it: name -> RGB around which objects are painted.
COLORS = {
    "red": (214, 39, 40),
    "orange": (245, 133, 24),
    "yellow": (240, 215, 50),
    "green": (50, 160, 60),
    "cyan": (40, 190, 200),
    "blue": (40, 80, 210),
    "purple": (130, 60, 170),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
_NAMES = tuple(COLORS)
_RGB = np.asarray([COLORS[name] for name in _NAMES], dtype=np.float64)
# The least distance in RGB of an object's main colour to its background and to its own second colour.
_CONTRAST_BACKGROUND = 90.0
_CONTRAST_PATTERN = 130.0
_TILT = np.deg2rad(20.0)


@dataclass(frozen=True)
class PlacedObject:
    """One object of a scene.

    shape, texture, color: the words that describe it (``color`` names the main colour).
    box_xyxy: tight box of its visible pixels. area: their number. visible: share of its pixels seen, 0 to 1.
    """

    shape: str
    texture: str
    color: str
    box_xyxy: tuple[float, float, float, float]
    area: int
    visible: float


@dataclass(frozen=True)
class Scene:
    """image: (H, W, 3) uint8 RGB. objects: N. masks: (N, H, W) bool of visible pixels."""

    image: np.ndarray
    objects: tuple[PlacedObject, ...]
    masks: np.ndarray


def render_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    wanted: Iterable[tuple[str, str, float]],
    min_visible: float = 0.65,
    margin: float = 0.2,
) -> Scene:
    """Draw a scene.

    Args:
        rng: of all that is drawn.
        height, width: pixels.
        wanted: (shape, texture, diameter in pixels), painted in this order, later over earlier.
        min_visible: least share of each object's pixels that stays visible; an object for which no such place is found
            in 30 draws is omitted.
        margin: share of the diameter by which a centre must stay inside the image (0.5: never cut off by the border).

    """
    canvas = _clutter(rng, _background(rng, height, width))
    patches: list[tuple[str, str, str]] = []
    alphas = []
    for shape, texture, diameter in wanted:
        under = canvas.mean(axis=(0, 1))
        color, patch, alpha = _object_patch(rng, shape, texture, diameter, under)
        place = _find_place(rng, alpha, alphas, height, width, diameter, margin, min_visible)
        if place is None:
            continue
        top, left, solid = place
        _paste(canvas, patch, alpha, top, left)
        alphas = [(others & ~solid, count) for others, count in alphas] + [(solid, int((alpha > 0.5).sum()))]
        patches.append((shape, texture, color))
    objects = tuple(
        PlacedObject(shape, texture, color, _tight_box(mask), int(mask.sum()), float(mask.sum() / count))
        for (shape, texture, color), (mask, count) in zip(patches, alphas, strict=True)
    )
    masks = np.stack([mask for mask, _ in alphas]) if alphas else np.zeros((0, height, width), dtype=bool)
    return Scene(_finish(rng, canvas), objects, masks)


def _smooth_noise(rng, height, width, cells):
    """(H, W) float32 noise in [0, 1] whose grain is the image divided by ``cells``."""
    coarse = (rng.random((cells + 1, cells + 1)) * 255.0).astype(np.uint8)
    return (
        np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255.0
    )


def _background(rng, height, width):
    """(H, W, 3) float32: two colours mixed by smooth noise or weak waves, with a fine grain."""
    first, second = rng.uniform(30, 225, (2, 3))
    second = first + (second - first) * rng.uniform(0.15, 0.6)
    mix = _smooth_noise(rng, height, width, int(rng.integers(2, 24)))
    if rng.random() < 0.35:
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(6, 60)
        wave = 0.5 + 0.5 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period) + 4.0 * mix)
        mix = 0.5 * mix + 0.5 * wave
    canvas = first + mix[..., None] * (second - first)
    grain = rng.normal(0.0, rng.uniform(0.0, 12.0), (height, width, 1))
    return (canvas + grain).astype(np.float32)


def _clutter(rng, canvas):
    """``canvas`` with lines, scribbles and irregular blobs that belong to no class."""
    height, width = canvas.shape[:2]
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).resize(
        (2 * width, 2 * height), Image.Resampling.BILINEAR
    )
    draw = ImageDraw.Draw(image)
    size = np.asarray([2 * width, 2 * height], dtype=float)
    for _ in range(int(rng.integers(0, 5))):
        color = tuple(int(v) for v in rng.uniform(10, 245, 3))
        kind = rng.random()
        if kind < 0.4:
            ends = rng.uniform(-0.1, 1.1, (2, 2)) * size
            draw.line([tuple(p) for p in ends], fill=color, width=int(rng.integers(2, 9)))
        elif kind < 0.7:
            steps = rng.normal(0.0, rng.uniform(8, 30), (int(rng.integers(6, 20)), 2))
            walk = np.cumsum(steps, axis=0) + rng.uniform(0, 1, 2) * size
            draw.line([tuple(p) for p in walk], fill=color, width=int(rng.integers(2, 6)), joint="curve")
        else:
            angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
            wobble = sum(rng.uniform(-0.35, 0.35) * np.sin(k * angles + rng.uniform(0, 6.3)) for k in range(1, 5))
            radius = rng.uniform(8, 60) * (1.0 + wobble)
            points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None] * rng.uniform(0.4, 1.0, 2)
            points = points + rng.uniform(0, 1, 2) * size
            draw.polygon([tuple(p) for p in points], fill=color)
    return np.array(image.reduce(2), dtype=np.float32)


def _pick_colors(rng, under):
    """Index of a main colour that stands out from ``under``, and of the second one: white, or black on a light main."""
    distance = np.linalg.norm(_RGB - under, axis=1)
    main = int(rng.choice(np.flatnonzero(distance > min(_CONTRAST_BACKGROUND, distance.max() - 1.0))))
    light = np.linalg.norm(_RGB[main] - _RGB[_NAMES.index("white")]) < _CONTRAST_PATTERN
    return main, _NAMES.index("black" if light else "white")


def _object_patch(rng, shape, texture, diameter, under):
    """Draw one object on a separate patch.

    Returns:
        (color name, patch (P, P, 3) float32, alpha (P, P) float32 in [0, 1]).
    """
    side = int(np.ceil(diameter)) + 4
    scale = 3 if diameter < 64 else 2
    # Mostly upright, as things in photographs are; mirrored in half of the draws.
    angle, squeeze, mirror = rng.uniform(-_TILT, _TILT), rng.uniform(0.85, 1.0), rng.choice([-1.0, 1.0])
    cos, sin = np.cos(angle), np.sin(angle)
    center, radius = side * scale / 2.0, diameter * scale / 2.0
    mask = Image.new("L", (side * scale, side * scale), 0)
    draw = ImageDraw.Draw(mask)
    for points, filled in outline(shape):
        x, y = points[:, 0] * mirror, points[:, 1] * squeeze
        corners = np.stack([x * cos - y * sin, x * sin + y * cos], axis=1) * radius + center
        draw.polygon([tuple(p) for p in corners], fill=255 if filled else 0)
    rows, columns = np.mgrid[0 : side * scale, 0 : side * scale].astype(np.float32)
    x, y = (columns + 0.5 - center) / radius, (rows + 0.5 - center) / radius
    second_here = pattern(texture, x * cos + y * sin, y * cos - x * sin, rng)
    main, second = _pick_colors(rng, under)
    jitter = rng.normal(0.0, 9.0, (2, 3))
    colors = np.stack([_RGB[main], _RGB[second]]) + jitter
    share = Image.fromarray((second_here * 255).astype(np.uint8)).reduce(scale)
    share = np.asarray(share, dtype=np.float32)[..., None] / 255.0
    light = 1.0 + rng.uniform(0.0, 0.12) * (x * rng.choice([-1, 1]))[scale // 2 :: scale, scale // 2 :: scale, None]
    patch = ((1.0 - share) * colors[0] + share * colors[1]) * light
    alpha = np.asarray(mask.reduce(scale), dtype=np.float32) / 255.0
    patch = patch * (1.0 - _contour(alpha, diameter)[..., None])
    return _NAMES[main], patch.astype(np.float32), alpha


def _contour(alpha, diameter):
    """(P, P) strength in [0, 1] of the dark contour along the inner edge of ``alpha``, 4.5% of the diameter wide.

    As the shading of real objects does, it separates an outline from the edges of the texture inside.
    """
    width = max(1, round(0.045 * diameter))
    inner = Image.fromarray((alpha * 255.0).astype(np.uint8)).filter(ImageFilter.MinFilter(2 * width + 1))
    return 0.85 * (alpha - np.asarray(inner, dtype=np.float32) / 255.0).clip(0.0, 1.0)


def _find_place(rng, alpha, placed, height, width, diameter, margin, min_visible):
    """A place where enough of the new object and of the ones below it stays visible: (top, left, mask) or None."""
    side = alpha.shape[0]
    count = int((alpha > 0.5).sum())
    for _ in range(30):
        inset = min(margin * diameter, min(height, width) / 2.0)
        x = rng.uniform(inset, width - inset)
        y = rng.uniform(inset, height - inset)
        top, left = int(round(y - side / 2)), int(round(x - side / 2))
        solid = np.zeros((height, width), dtype=bool)
        inside, of_patch = _overlap(height, width, side, top, left)
        solid[inside] = alpha[of_patch] > 0.5
        if solid.sum() < min_visible * count:
            continue
        if all((mask & ~solid).sum() >= min_visible * whole for mask, whole in placed):
            return top, left, solid
    return None


def _overlap(height, width, side, top, left):
    """Slices of the image and of a patch at (top, left) where the two overlap."""
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + side, height), min(left + side, width)
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _paste(canvas, patch, alpha, top, left):
    inside, of_patch = _overlap(canvas.shape[0], canvas.shape[1], alpha.shape[0], top, left)
    weight = alpha[of_patch][..., None]
    canvas[inside] = canvas[inside] * (1.0 - weight) + patch[of_patch] * weight


def _tight_box(mask):
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _finish(rng, canvas):
    """Sensor noise and exposure, then uint8."""
    noise = rng.normal(0.0, rng.uniform(1.0, 7.0), canvas.shape)
    return np.clip(canvas * rng.uniform(0.85, 1.1) + noise + 0.5, 0, 255).astype(np.uint8)
