"""The shared memory by which loading processes hand over samples."""

import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")


def shared_memory() -> tuple[int, int] | None:
    """(free, total) bytes of the shared memory by which loading processes hand over samples; None if it is unknown."""
    try:
        stated = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return stated.f_bavail * stated.f_frsize, stated.f_blocks * stated.f_frsize


def remedy() -> str:
    """What to change when loading processes fail, with the free shared memory."""
    found = shared_memory()
    state = "" if found is None else f" ({found[0] / 1e6:,.0f} of {found[1] / 1e6:,.0f} MB are free)"
    return (
        f"Often shared memory, {SHARED_MEMORY}{state}, or memory has run out: enlarge it (docker run --shm-size 8g), or "
        "lower DATALOADER.NUM_WORKERS; with 0 there are no such processes."
    )
