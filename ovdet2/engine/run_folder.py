"""A claim on OUTPUT_DIR: one training at a time writes into a folder. What killed runs left there is removed."""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
from pathlib import Path

from ovdet2.caches.claims import STALE_SECONDS, Claims, is_running
from ovdet2.errors import SetupError, counted

logger = logging.getLogger(__name__)

_NAME = "run"
_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")  # of ovdet2.io.files.atomic_path
_held: dict[Path, Claims] = {}


def claim_folder(folder: str | Path) -> bool:
    """Claim a folder for the trainings of this process.

    Returns:
        False if this process has the claim already.

    Raises:
        SetupError: a training of another process writes into it.
    """
    folder = Path(folder).resolve()
    if folder in _held:
        return False
    claims = Claims(folder)
    if not claims.take(_NAME):
        if not _heartbeat_stopped(folder):
            raise SetupError(f"{folder} is in use by {_owner(folder)}: stop it, or set another OUTPUT_DIR.")
        (folder / f"{_NAME}.lock").unlink(missing_ok=True)
        if not claims.take(_NAME):
            raise SetupError(f"{folder} is in use by {_owner(folder)}: stop it, or set another OUTPUT_DIR.")
    _held[folder] = claims.__enter__()
    return True


def release_folder(folder: str | Path) -> None:
    """Give up the claim of this process, if it has it."""
    claims = _held.pop(Path(folder).resolve(), None)
    if claims is not None:
        claims.__exit__()


def is_claimed(folder: str | Path) -> bool:
    """Whether another process trains in a folder."""
    folder = Path(folder).resolve()
    path = folder / f"{_NAME}.lock"
    if folder in _held or not path.is_file():
        return False
    claims = Claims(folder)
    if claims.take(_NAME):
        claims.release(_NAME)
        return False
    return not _heartbeat_stopped(folder)


@atexit.register
def _release_all() -> None:
    for folder in list(_held):
        release_folder(folder)


def _owner(folder):
    """The owner of the claim, in words."""
    try:
        owner = json.loads((folder / f"{_NAME}.lock").read_text())
        return f"a training, process {owner['pid']} on {str(owner['machine']).split()[0]}"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "another training"


def _heartbeat_stopped(folder):
    """Whether a claim of another machine, or of a container that is gone, is out of date by the folder's clock."""
    probe = folder / f".{os.getpid()}.probe"
    try:
        probe.touch()
        return probe.stat().st_mtime - (folder / f"{_NAME}.lock").stat().st_mtime > STALE_SECONDS
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def sweep_folder(folder: str | Path) -> None:
    """Remove temporary files that killed processes left in a claimed folder: a checkpoint's may have gigabytes."""
    removed = size = 0
    for path in Path(folder).glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or is_running(int(match[1])):
            continue
        try:
            size += path.stat().st_size
            path.unlink()
        except OSError:
            continue  # another process has removed it, or the file system refuses
        removed += 1
    if removed:
        logger.info("Removed %s (%.1f MB) of runs that were killed.", counted(removed, "temporary file"), size / 1e6)
