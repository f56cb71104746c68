"""The recorded state of a run or an artefact: hashes of its inputs, minutes, whether it is done."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from ovdet2.caches.region_cache import read_manifest
from ovdet2.errors import DataError
from ovdet2.io.files import read_json, sha256_file, write_json

_INPUTS = "made_of"  # in the files


def read_state(path: Path) -> dict[str, Any] | None:
    """The state in a file; None if there is none."""
    return read_json(path) if path.is_file() else None


def differing(state: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Names of the inputs whose hash is not the recorded one."""
    recorded = state.get(_INPUTS, state)  # earlier versions recorded only an ablation's configuration
    return [name for name, value in inputs.items() if recorded.get(name) != value]


@contextlib.contextmanager
def recorded(path: Path, state: Mapping[str, Any], inputs: Mapping[str, str]) -> Generator[dict[str, Any], None, None]:
    """Keep the state of a step in ``path``: written before the step, so that a killed one can be recognised, and after.

    Args:
        path: json file.
        state: of earlier attempts, whose minutes count.
        inputs: {name: hash}.

    Yields:
        dict, the state; entries that the body adds are written. "done" is set when the body ends without an error.
    """
    before, started = state.get("minutes", 0.0), time.monotonic()
    current = {**state, "minutes": before, _INPUTS: dict(inputs)}
    write_json(path, current)
    try:
        yield current
        current["done"] = True
    finally:
        current["minutes"] = round(before + (time.monotonic() - started) / 60, 2)
        write_json(path, current)


def is_complete(path: Path) -> bool:
    """Whether an artefact exists: a file, which is written atomically, or a folder with its manifest."""
    return path.is_file() or (path / "manifest.json").is_file()


def content_hash(source: Path | Callable[[], str]) -> str:
    """Hash of the contents of a file or of a region cache, whatever command made it; or the result of a function.

    Raises:
        DataError: a file that does not exist.
    """
    if not isinstance(source, Path):
        return source()
    if source.is_dir():
        shards = [shard["sha256"] for shard in read_manifest(source)["shards"]]
        return text_hash("".join(shards))
    if not source.is_file():
        raise DataError(f"{source} does not exist: check the path.")
    return sha256_file(source)


def text_hash(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def settings_hash(settings: Any) -> str:
    """Hex SHA-256 of what json can hold, whatever the order of its keys."""
    return text_hash(json.dumps(settings, sort_keys=True))
