"""Skip faulty entries of a data set, up to a tolerated number."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ovdet2.errors import DataError

logger = logging.getLogger(__name__)
_SHOWN = 5  # faults named in a message


def shown(values: Sequence[object], separator: str = ", ") -> str:
    """The first five values as text, followed by dots if there are more."""
    return separator.join(map(str, values[:_SHOWN])) + (f"{separator}..." if len(values) > _SHOWN else "")


def require_few(faults: Sequence[str], max_bad: int, source: str | Path, usable: int, need: str = "caption") -> None:
    """Warn of the skipped entries; refuse a data set with too many of them.

    Args:
        faults: one text per skipped entry.
        max_bad: tolerated number of faults.
        source: the file, for messages.
        usable: number of images that are left.
        need: the annotation that an image must have, for messages.

    Raises:
        DataError: more faults than tolerated, or no image left.
    """
    listed = shown(faults, "; ")
    if len(faults) > max_bad:
        raise DataError(
            f"{source} has {len(faults)} faulty entries, max_bad is {max_bad}: {listed}. Give each image a {need} "
            "or remove it, or raise max_bad of the data set (DATALOADER.MAX_BAD_IMAGES of a program)."
        )
    if not usable:
        raise DataError(
            f"{source} holds no image with a {need}{': ' + listed if listed else ''}: check that it is the right file."
        )
    if faults:
        logger.warning("%s: %d entries are skipped: %s", source, len(faults), listed)
