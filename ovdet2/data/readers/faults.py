"""Entries of a data set that are left out, up to a number that is tolerated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ovdet2.errors import DataError

logger = logging.getLogger(__name__)
_SHOWN = 5  # faults named in a message


def shown(values: Sequence[object], separator: str = ", ") -> str:
    """The first five values as text, with dots where there are more."""
    return separator.join(map(str, values[:_SHOWN])) + (f"{separator}..." if len(values) > _SHOWN else "")


def require_few(faults: Sequence[str], max_bad: int, source: str | Path, usable: int, need: str = "caption") -> None:
    """Warn of the entries that are left out.

    Args:
        faults: what is wrong with each.
        max_bad: how many are tolerated.
        source: the file, for messages.
        usable: images that are left.
        need: what an image must have.

    Raises:
        DataError: more faults than tolerated, or no image left.
    """
    listed = shown(faults, "; ")
    if len(faults) > max_bad:
        raise DataError(
            f"{source} has {len(faults)} faulty entries, {max_bad} are tolerated: {listed}. Give each image a {need} "
            "or remove it, or raise max_bad of the data set (DATALOADER.MAX_BAD_IMAGES of a program)."
        )
    if not usable:
        raise DataError(
            f"{source} holds no image with a {need}{': ' + listed if listed else ''}: check that it is the right file."
        )
    if faults:
        logger.warning("%s: %d entries are left out: %s", source, len(faults), listed)
