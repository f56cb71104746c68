"""The captioned images of OV-Shapes as files, so that they are read as any COCO-captions data set is."""

import fcntl
import os
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ovdet2.io.files import atomic_path, write_json
from ovdet2.ov_shapes.world.captions import caption_pair, further_captions
from ovdet2.ov_shapes.world.scenes import render_images

FOLDER = "ov_shapes/captions"
_SEED = 0


def ensure_captions(root, count=10_000, each=5, workers=None):
    """Draw captioned images below ``root/ov_shapes/captions`` unless they are there: images/*.jpg and a json.

    The first 10,000 images, with the first caption of each, are what the embedded models were trained on
    (:func:`~ovdet2.ov_shapes.world.captions.caption_pair`), as JPEG files like the detection images. One process draws
    under a file lock, others wait for it; the json is written last, so a run that was cut short begins again.

    Args:
        root: folder of all data sets.
        count: of the images.
        each: captions of an image.
        workers: processes that draw; None: one per core.

    Returns:
        (the json, the folder of the images).
    """
    folder = Path(root) / FOLDER
    path = folder / f"captions_{count}x{each}.json"
    if not path.is_file():  # nothing is written, not even a lock, to a folder that is whole
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _draw(path, count, each, workers or os.cpu_count())
    return path, folder / "images"


def _draw(path, count, each, workers):
    draw = partial(_draw_one, path.parent / "images", each)
    captions = list(render_images(draw, count, workers, partial(tqdm, desc="captions")))
    write_json(
        path,
        {
            "info": {"description": "OV-Shapes captions", "seed": _SEED},
            "images": [{"id": index, "file_name": _name(index)} for index in range(count)],
            "annotations": [
                {"id": index * each + number, "image_id": index, "caption": caption}
                for index, found in enumerate(captions)
                for number, caption in enumerate(found)
            ],
        },
    )


def _draw_one(folder, each, index):
    """Write an image, whole or not at all; returns its captions."""
    image, caption, scene = caption_pair(_SEED, index)
    with atomic_path(folder / _name(index)) as temporary:
        Image.fromarray(image).save(temporary, format="JPEG", quality=95)
    return [caption, *further_captions(_SEED, index, scene.objects, each - 1)]


def _name(index):
    return f"{index:06d}.jpg"
