"""Image-caption pairs in place of web data: they name base and novel words, and no pair uses a detection image.

An image is mostly one object that fills much of the frame. A caption is a loose phrase about what is seen; it may name
the colour, and sometimes omits the texture, as captions of the web do. There are no boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ovdet2.io.files import atomic_path
from ovdet2.ov_shapes.world.classes import SHAPES, TEXTURES
from ovdet2.ov_shapes.world.render import PlacedObject, Scene, render_scene
from ovdet2.ov_shapes.world.scenes import Progress, render_images, stream

CAPTION_COUNT = 10_000
_FILES_SEED = 0  # of the images that are drawn as files

_QUALITIES = tuple(
    "good bad nice cool weird clean dirty bright dark blurry pixelated cropped small large big tiny corrupted rendered "
    "embroidered plastic hidden".split()
)
_MEDIA = tuple(
    "photo picture image drawing painting rendering sketch sculpture doodle cartoon tattoo toy game art rendition "
    "origami graphic icon".split()
)
_LINKS = ("and", "and", "with", "next to", "beside", "on top of")
_ENDINGS = ("in the scene", "on a background", "seen today", "for sale", "in a picture", "close up", "on the wall")
_OPENINGS = ("this is", "there is", "itap of", "look at", "here is", "i like")


def caption_pair(seed: int, index: int, side: int = 128) -> tuple[np.ndarray, str, Scene]:
    """One image with its caption.

    Args:
        seed: of the data set, >= 0.
        index: of the pair, 0..CAPTION_COUNT-1 (any number >= 0 works).
        side: width and height of the image in pixels.

    Returns:
        (image, caption, scene): the image is (side, side, 3) uint8 RGB; training does not look at the scene.
    """
    rng = stream(seed, "captions", index)
    while True:
        scene = render_scene(rng, side, side, _wanted(rng, side), min_visible=0.7, margin=0.4)
        if scene.objects:
            return scene.image, caption_of(rng, scene.objects), scene


def further_captions(seed: int, index: int, objects: Sequence[PlacedObject], count: int) -> list[str]:
    """Other captions of the image of a pair, for data sets with several of each.

    Args:
        seed, index: as of :func:`caption_pair`.
        objects: of its scene.
        count: of the captions.

    Returns:
        The first ones do not depend on ``count``.
    """
    rng = stream(seed, "further captions", index)
    return [caption_of(rng, objects) for _ in range(count)]


def caption_of(rng: np.random.Generator, objects: Sequence[PlacedObject]) -> str:
    """A caption for the objects of a scene, in random order."""
    order = rng.permutation(len(objects))
    phrases = [_object_phrase(rng, objects[i]) for i in order]
    text = phrases[0]
    for phrase in phrases[1:]:
        text = f"{text} {_pick(rng, _LINKS)} {phrase}"
    kind = rng.random()
    if kind < 0.6:
        quality = f"{_pick(rng, _QUALITIES)} " if rng.random() < 0.4 else ""
        article = _pick(rng, ("a", "a", "the"))
        text = f"{article} {quality}{_pick(rng, _MEDIA)} of {text}"
        if rng.random() < 0.2:
            text = f"this is {text}"
    elif kind < 0.8:
        text = f"{_pick(rng, _OPENINGS)} {text}"
    if rng.random() < 0.2:
        text = f"{text} {_pick(rng, _ENDINGS)}"
    return text + ("." if rng.random() < 0.4 else "")


def _wanted(rng, side):
    """(shape, texture, diameter) of one main object, and in a third of the images of one or two smaller ones."""
    diameters = [side * rng.uniform(0.5, 1.0)]
    if rng.random() < 0.33:
        diameters = [side * rng.uniform(0.35, 0.65)]
        diameters += list(side * rng.uniform(0.22, 0.45, size=int(rng.integers(1, 3))))
    return [(_pick(rng, SHAPES), _pick(rng, TEXTURES), float(diameter)) for diameter in diameters]


def _object_phrase(rng, placed):
    words = [placed.shape]
    if rng.random() < 0.9:
        words.insert(0, placed.texture)
    if rng.random() < 0.35:
        words.insert(int(rng.integers(0, len(words))), placed.color)
    if rng.random() < 0.15:
        words.insert(0, _pick(rng, _QUALITIES))
    article = "an" if words[0][0] in "aeiou" else "a"
    start = rng.random()
    if start < 0.7:
        words.insert(0, article)
    elif start < 0.85:
        words.insert(0, _pick(rng, ("the", "one", "my")))
    return " ".join(words)


def _pick(rng, options):
    return options[int(rng.integers(len(options)))]


def render_captions(
    seed: int, count: int, side: int = 128, workers: int = 1, progress: Progress | None = None
) -> tuple[np.ndarray, list[str]]:
    """The first ``count`` pairs as arrays.

    Args:
        seed, side: as of :func:`caption_pair`.
        count: number of pairs.
        workers, progress: as of :func:`~ovdet2.ov_shapes.world.scenes.render_images`.

    Returns:
        (images, captions): images are (count, side, side, 3) uint8.
    """
    images, captions = np.empty((count, side, side, 3), dtype=np.uint8), []
    pairs = render_images(partial(_image_and_caption, seed, side), count, workers, progress)
    for index, (image, caption) in enumerate(pairs):
        images[index] = image
        captions.append(caption)
    return images, captions


def _image_and_caption(seed, side, index):
    return caption_pair(seed, index, side)[:2]


def draw_captions(folder: Path, count: int, each: int, workers: int = 1) -> dict[str, Any]:
    """Write the first ``count`` images as JPEG files, 000000.jpg and so on.

    Args:
        folder: of the files.
        count: of the images.
        each: captions of an image: that of :func:`caption_pair`, then :func:`further_captions`.
        workers: processes that draw.

    Returns:
        The content of a COCO-captions json, of images 0..count-1.
    """
    draw = partial(_draw_file, folder, each)
    captions = list(render_images(draw, count, workers, partial(tqdm, desc="captions")))
    return {
        "info": {"description": "OV-Shapes captions", "seed": _FILES_SEED},
        "images": [{"id": index, "file_name": _file_name(index)} for index in range(count)],
        "annotations": [
            {"id": index * each + number, "image_id": index, "caption": caption}
            for index, of_image in enumerate(captions)
            for number, caption in enumerate(of_image)
        ],
    }


def _draw_file(folder, each, index):
    """Write an image, completely or not at all; returns its captions."""
    image, caption, scene = caption_pair(_FILES_SEED, index)
    with atomic_path(folder / _file_name(index)) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=95)
    return [caption, *further_captions(_FILES_SEED, index, scene.objects, each - 1)]


def _file_name(index):
    return f"{index:06d}.jpg"
