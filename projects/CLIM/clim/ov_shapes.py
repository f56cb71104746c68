"""The captioned images of OV-Shapes as files, so that they are read as any COCO-captions data set is."""

import fcntl
import os
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ovdet2.data.shapes.captions import caption_pair
from ovdet2.data.shapes.scenes import render_images
from ovdet2.errors import DataError
from ovdet2.files import read_json, write_json

FOLDER = "ov_shapes/captions"


def ensure_captions(root, seed=0, count=10_000, workers=None):
    """Draw the pairs below ``root/ov_shapes/captions`` unless they are there: images/*.jpg and captions.json.

    The images are those that the embedded models were trained on (:func:`~ovdet2.data.shapes.captions.caption_pair`),
    as JPEG files like the detection images. One process draws under a file lock, others wait for it; the json is
    written last, so a run that was cut short begins again.

    Args:
        root: folder of all data sets.
        seed, count: of the pairs.
        workers: processes that draw; None: one per core.

    Returns:
        The folder.

    Raises:
        DataError: another number of pairs, or of another seed, is there.
    """
    folder = Path(root) / FOLDER
    if not (folder / "captions.json").is_file():  # nothing is written, not even a lock, to a folder that is whole
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "captions.json").is_file():
                _draw(folder, seed, count, workers or os.cpu_count())
    found = read_json(folder / "captions.json", f"delete {folder}").get("info", {})
    if (found.get("seed"), found.get("pairs")) != (seed, count):
        raise DataError(
            f"{folder} holds {found.get('pairs')} pairs of seed {found.get('seed')}, not {count} of seed {seed}: "
            "delete it, or set CLIM.PAIRS to what is there."
        )
    return folder


def _draw(folder, seed, count, workers):
    drawn = render_images(partial(_draw_one, seed, folder / "images"), count, workers, partial(tqdm, desc="captions"))
    captions = list(drawn)
    write_json(
        folder / "captions.json",
        {
            "info": {"description": "OV-Shapes captions", "seed": seed, "pairs": count},
            "images": [{"id": index, "file_name": _name(index)} for index in range(count)],
            "annotations": [
                {"id": index, "image_id": index, "caption": caption} for index, caption in enumerate(captions)
            ],
        },
    )


def _draw_one(seed, folder, index):
    image, caption, _ = caption_pair(seed, index)
    Image.fromarray(image).save(folder / _name(index), quality=95)
    return caption


def _name(index):
    return f"{index:06d}.jpg"
