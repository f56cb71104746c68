"""The log of readings of held-out test sets: one json line for each evaluation, written before it starts."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ovdet2.errors import DataError
from ovdet2.experiments.command import CHECKOUT

FILE = "test_readings.jsonl"


def log_reading(folder: Path, row: str, seed: int | None, weights_sha256: str, command: Sequence[str]) -> None:
    """Append a line to ``folder``/test_readings.jsonl. An evaluation that is interrupted later counts, too.

    Args:
        folder: of the experiment that trains; removing the results of a test set does not remove the log.
        row: name of the entry or artefact that reads the test set.
        seed: of the row; None for what no seed decides.
        weights_sha256: of the evaluated weights; "" without any.
        command: the program and its arguments.
    """
    line = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "row": row,
        "seed": seed,
        "weights_sha256": weights_sha256,
        "commit": _commit(),
        "command": shlex.join(command),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / FILE, "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")  # one write, so that lines of several processes do not mix


def count_readings(folder: Path, row: str) -> int:
    """How often a row read the test set, over all seeds and weights.

    Raises:
        DataError: the log is damaged.
    """
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        return sum(json.loads(line)["row"] == row for line in lines)
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path} is damaged: every line must be a json object with a row; repair it by hand.") from None


def _commit() -> str:
    """The commit of a checkout, with "+" if files differ from it; "" for an installed package."""
    status = _git("status", "--porcelain", "--untracked-files=no") if (CHECKOUT / ".git").exists() else None
    return "" if status is None else (_git("rev-parse", "HEAD") or "").strip() + ("+" if status else "")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return None if done.returncode else done.stdout
