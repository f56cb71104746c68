"""The scene of each image of OV-Shapes: a pure function of (seed, split, index), so any order gives the same images."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import numpy as np

from ovdet2.ov_shapes.world.classes import BASE_NAMES, CLASS_NAMES
from ovdet2.ov_shapes.world.render import PlacedObject, Scene, render_scene

# The number of a split is part of its images' seeds: captions never share one with the detection images.
_STREAMS = {
    "train2017": 0,
    "val2017": 1,
    "captions": 2,
    "single": 3,
    "pretraining": 4,
    "further captions": 5,
    "test2017": 6,
}
IMAGE_COUNTS = {"train2017": 2000, "val2017": 500}
TEST_SPLIT, TEST_COUNT = "test2017", 1000
# (width, height) of the detection images with their shares; not all are square, so code that assumes it fails.
_SIZES = ((224, 224), (256, 192), (192, 256))
_SIZE_SHARES = (0.5, 0.25, 0.25)
_DIAMETERS = (36.0, 130.0)
Drawn = TypeVar("Drawn")
Progress = Callable[..., Iterable]  # wraps an iterator and takes ``total``, such as tqdm


def stream(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of one image.

    Args:
        seed: of the data set, >= 0.
        split: "train2017", "val2017", "test2017", "captions", "single", "pretraining" or "further captions".
        index: of the image in its split, >= 0.

    Returns:
        Distinct arguments give independent ones.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _STREAMS[split], index))))


def class_weights(split: str) -> np.ndarray:
    """(65,) probabilities of the classes: uniform for validation and test; in training base has a mild long tail, 3 to 1."""
    weights = np.ones(len(CLASS_NAMES))
    if split == "train2017":
        count = len(BASE_NAMES)
        # 7 is prime to 48: neighbours in the list (textures of one shape) spread over the tail.
        rank = (np.arange(count) * 7) % count
        weights[:count] = 3.0 ** (0.5 - rank / (count - 1))
    return weights / weights.sum()


def detection_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of one detection image: 1 to 6 objects (2 to 6 are tried) of 36 to 130 pixels.

    Args: as of :func:`stream`; split is "train2017", "val2017" or "test2017".

    Returns:
        With at least one object.
    """
    rng = stream(seed, split, index)
    width, height = _SIZES[rng.choice(len(_SIZES), p=_SIZE_SHARES)]
    weights = class_weights(split)
    while True:
        names = [CLASS_NAMES[i] for i in rng.choice(len(CLASS_NAMES), size=int(rng.integers(2, 7)), p=weights)]
        diameters = np.exp(rng.uniform(*np.log(_DIAMETERS), size=len(names)))
        wanted = [
            (name.split()[1], name.split()[0], float(diameter)) for name, diameter in zip(names, diameters, strict=True)
        ]
        # Large objects first: they are painted below the small ones and the occlusion cap leaves room for all.
        wanted.sort(key=lambda entry: -entry[2])
        scene = render_scene(rng, height, width, wanted, min_visible=0.75, margin=0.35)
        if scene.objects:
            return scene


def class_index(placed: PlacedObject) -> int:
    """Base-first index 0..64 of an object."""
    return CLASS_NAMES.index(f"{placed.texture} {placed.shape}")


def single_object_scene(seed: int, index: int, side: int = 128) -> Scene:
    """A clean test image of one class: one complete object that fills 50 to 95% of the frame.

    Args:
        seed, index: as of :func:`stream`; the class is ``index`` modulo 65, in base-first order.
        side: width and height in pixels.
    """
    return _one_object(stream(seed, "single", index), CLASS_NAMES[index % len(CLASS_NAMES)], side, least=0.5)


def pretraining_scene(seed: int, index: int, side: int = 128) -> Scene:
    """An image for the pre-training of a trunk: one object of a base class that fills 35 to 95% of the frame.

    Args:
        seed, index: as of :func:`stream`; the class is ``index`` modulo 48, in the order of BASE_NAMES.
        side: width and height in pixels.
    """
    return _one_object(stream(seed, "pretraining", index), BASE_NAMES[index % len(BASE_NAMES)], side, least=0.35)


def _one_object(rng, name, side, least):
    texture, shape = name.split()
    return render_scene(rng, side, side, [(shape, texture, side * rng.uniform(least, 0.95))], margin=0.5)


def render_images(
    draw: Callable[[int], Drawn], count: int, workers: int = 1, progress: Progress | None = None
) -> Iterator[Drawn]:
    """``draw(index)`` for 0..count-1, in order.

    Args:
        draw: picklable function of an index.
        count: of the results.
        workers: processes that draw; any number gives the same results.
        progress: wraps the results.

    Yields:
        what ``draw`` returns.
    """
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("fork").Pool(workers))
            drawn = pool.imap(draw, range(count), chunksize=64)
        else:
            drawn = map(draw, range(count))
        yield from progress(drawn, total=count) if progress else drawn


def render_pretraining(
    seed: int, count: int, side: int = 128, workers: int = 1, progress: Progress | None = None
) -> np.ndarray:
    """Images (count, side, side, 3) uint8 of :func:`pretraining_scene`; arguments as of :func:`render_images`."""
    draw = partial(_pretraining_image, seed, side)
    return np.stack(list(render_images(draw, count, workers, progress)))


def _pretraining_image(seed, side, index):
    return pretraining_scene(seed, index, side).image
