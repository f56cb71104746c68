"""What is on the images of OV-Shapes: a pure function of (seed, split, index), so any order gives the same images."""

import numpy as np

from ovdet2.data.shapes.classes import BASE_NAMES, CLASS_NAMES
from ovdet2.data.shapes.render import render_scene

# The number of a split is part of its images' seeds: captions never share one with the detection images.
_STREAMS = {"train2017": 0, "val2017": 1, "captions": 2, "single": 3}
IMAGE_COUNTS = {"train2017": 2000, "val2017": 500}
# (width, height) of the detection images with their shares; not all are square, so that nothing downstream assumes it.
_SIZES = ((224, 224), (256, 192), (192, 256))
_SIZE_SHARES = (0.5, 0.25, 0.25)
_DIAMETERS = (36.0, 130.0)


def stream(seed, split, index):
    """The random numbers of one image.

    Args:
        seed: of the whole data set, >= 0.
        split: "train2017", "val2017", "captions" or "single".
        index: of the image in its split, >= 0.

    Returns:
        numpy Generator; distinct arguments give independent ones.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, _STREAMS[split], index))))


def class_weights(split):
    """(65,) probabilities of the classes: uniform for validation; in training base has a mild long tail, 3 to 1."""
    weights = np.ones(len(CLASS_NAMES))
    if split == "train2017":
        count = len(BASE_NAMES)
        # 7 is prime to 48: neighbours in the list (textures of one shape) spread over the tail.
        rank = (np.arange(count) * 7) % count
        weights[:count] = 3.0 ** (0.5 - rank / (count - 1))
    return weights / weights.sum()


def detection_scene(seed, split, index):
    """The scene of one detection image: 1 to 6 objects (2 to 6 are tried) of 36 to 130 pixels.

    Args: as of :func:`stream`; split is "train2017" or "val2017".

    Returns:
        :class:`~ovdet2.data.shapes.render.Scene` with at least one object.
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


def class_index(placed):
    """Base-first index 0..64 of a :class:`~ovdet2.data.shapes.render.PlacedObject`."""
    return CLASS_NAMES.index(f"{placed.texture} {placed.shape}")


def single_object_scene(seed, index, side=128):
    """A clean test image of one class: one whole object that fills 50 to 95% of the frame.

    Args:
        seed, index: as of :func:`stream`; the class is ``index`` modulo 65, in base-first order.
        side: width and height in pixels.

    Returns:
        :class:`~ovdet2.data.shapes.render.Scene`.
    """
    rng = stream(seed, "single", index)
    texture, shape = CLASS_NAMES[index % len(CLASS_NAMES)].split()
    return render_scene(rng, side, side, [(shape, texture, side * rng.uniform(0.5, 0.95))], margin=0.5)
