"""The captioned images of OV-Shapes, generated on first use: ov_shapes_captions.

<root>/ov_shapes/captions/images/000000.jpg ...
<root>/ov_shapes/captions/captions_10000x5.json     COCO-captions json, written last; numbers: images x captions each
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from pathlib import Path

from ovdet2.data.datasets.register import data_root
from ovdet2.data.datasets.register_readers import register_captions
from ovdet2.errors import UsageError
from ovdet2.io.files import write_json
from ovdet2.ov_shapes.world.captions import CAPTION_COUNT, draw_captions

logger = logging.getLogger(__name__)
FOLDER = "ov_shapes/captions"
CAPTIONS_EACH = 5


def ensure_captions(
    root: str | Path, count: int = CAPTION_COUNT, each: int = CAPTIONS_EACH, workers: int | None = None
) -> tuple[Path, Path]:
    """Generate captioned images below ``root/ov_shapes/captions`` unless they exist: images/*.jpg and a json.

    The embedded models were trained on the first 10,000 images with the first caption of each
    (:func:`~ovdet2.ov_shapes.world.captions.caption_pair`); here they are JPEG files like the detection images. Sets of
    different sizes share the images. One process generates under a file lock, others wait for it. The json is written
    last, so an interrupted run starts again.

    Args:
        root: folder of all data sets.
        count: number of images.
        each: captions per image.
        workers: processes that draw; None: one per core.

    Returns:
        (the json, the folder of the images).

    Raises:
        UsageError: ``count`` or ``each`` is below 1.
    """
    if count < 1 or each < 1:
        raise UsageError(f"OV-Shapes needs at least one captioned image with one caption, not {count} x {each}.")
    folder = Path(root) / FOLDER
    path = folder / f"captions_{count}x{each}.json"
    if not path.is_file():  # a complete folder may be read-only: not even a lock is written
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                write_json(path, draw_captions(folder / "images", count, each, workers or os.cpu_count() or 1))
    return path, folder / "images"


def current_captions(root: str | Path) -> Path:
    """The captions json below ``root``: of 10,000 images with five captions each; if there is none, the largest of
    fewer images."""
    folder = Path(root) / FOLDER
    if not (full := folder / f"captions_{CAPTION_COUNT}x{CAPTIONS_EACH}.json").is_file():
        sizes = [re.fullmatch(rf"captions_(\d+)x{CAPTIONS_EACH}\.json", path.name) for path in folder.glob("*.json")]
        smaller = max((int(size[1]) for size in sizes if size and int(size[1]) < CAPTION_COUNT), default=0)
        if smaller:
            return folder / f"captions_{smaller}x{CAPTIONS_EACH}.json"
    return full


def ensure_current(root: str | Path) -> None:
    """Generate the data set below ``root`` unless it, or one of fewer images, exists."""
    path = current_captions(root)
    if not path.is_file():
        ensure_captions(root)
    elif path.name != f"captions_{CAPTION_COUNT}x{CAPTIONS_EACH}.json":
        logger.warning("ov_shapes_captions uses %s instead of the %d images of the full set.", path, CAPTION_COUNT)


register_captions(
    "ov_shapes_captions",
    lambda: current_captions(data_root()),
    f"{FOLDER}/images",
    prepare=lambda: ensure_current(data_root()),
)
