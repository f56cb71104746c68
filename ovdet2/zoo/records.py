"""The records of published detectors: ``ovdet2/assets/zoo/*.json``, one file per family.

A record is data only. To add one, add it to a json file and write its structure with ``tools/pin_zoo.py --structure``.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError, UsageError, did_you_mean
from ovdet2.io.files import read_json

SCHEMA = "ovdet2/zoo/1"
ASSETS = Path(__file__).resolve().parents[1] / "assets" / "zoo"
Structure = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """A place that has the file.

    Attributes:
        url: https address of the file, or, with ``by_hand``, of a page that a person must open in a browser.
        by_hand: whether no program can download it, as from Google Drive.
        bytes, sha256: of the file; None until ``tools/pin_zoo.py`` has measured them.
    """

    url: str
    by_hand: bool
    bytes: int | None
    sha256: str | None

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return urllib.parse.urlsplit(self.url).path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Licence:
    """Licences as their sources state them.

    Attributes:
        code, weights, data: of the authors' code, of the weights, and of the training data.
        non_commercial: whether the weights must not be used commercially; the user must then accept the licence.
    """

    code: str
    weights: str
    data: str
    non_commercial: bool

    def __str__(self) -> str:
        return f"{self.code} (code), {self.weights} (weights), {self.data} (training data)"


@dataclass(frozen=True)
class Figure:
    """A published figure, which was not measured here: what was measured, the value, and the page that states it."""

    metric: str
    value: str
    source: str


@dataclass(frozen=True)
class Training:
    """What the training had seen.

    Attributes:
        boxes: data set, and the classes whose boxes were used.
        image_labels: data sets and classes with labels of images; "none".
        captions: data sets with captions; "none".
        novel: classes of the evaluation without boxes in training, and whether their names occurred in labels or
            captions.
    """

    boxes: str
    image_labels: str
    captions: str
    novel: str


@dataclass(frozen=True)
class Record:
    """A published detector.

    Attributes:
        title: what it is, in the words of its authors.
        sources: where the file is, the preferred place first.
        config: name of a shipped configuration, and ``overrides`` of it, KEY VALUE pairs.
        converter: "module:function"; called with the file's weights, the configuration and ``options``, it returns the
            tensors for MODEL.WEIGHTS.
        structure: file of :data:`ASSETS` with the names and shapes of these tensors.
        teacher, templates: open_clip architecture and tag of the text tower, and prompt template set; None for a
            closed set.
        licence, figures, training: see their classes.
    """

    name: str
    title: str
    sources: tuple[Source, ...]
    config: str
    overrides: tuple[Any, ...]
    converter: str
    options: Mapping[str, Any]
    structure: str
    teacher: str | None
    templates: str | None
    licence: Licence
    figures: tuple[Figure, ...]
    training: Training

    @property
    def pinned(self) -> bool:
        """Whether the SHA-256 of each of its files is known."""
        return all(source.sha256 for source in self.sources)


def home() -> Path:
    """The folder of downloads: OVDET2_HOME, or ``~/.cache/ovdet2``."""
    return Path(os.environ.get("OVDET2_HOME") or Path.home() / ".cache" / "ovdet2")


def weights_path(name: str) -> Path:
    """Where the converted weights of a record are, once it is fetched or imported."""
    return home() / "zoo" / name / f"{name}.safetensors"


def record_of(name: str) -> Record:
    """The record of a name.

    Raises:
        UsageError: there is none; the message has the most similar name.
    """
    if name not in RECORDS:
        raise UsageError(f"the zoo has no {name!r}{did_you_mean(name, RECORDS)}: see `ovdet2 zoo list`.")
    return RECORDS[name]


def read_records(path: Path) -> dict[str, Record]:
    """The records of a json file.

    Raises:
        DataError: another schema, or an entry of a record is unknown, missing or of the wrong kind; the message names it.
    """
    data = read_json(path)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise DataError(f"{path} has not the schema {SCHEMA!r}: it is no file of records.")
    records = {}
    for name, entry in data["records"].items():
        entry = {"name": name, **entry}
        nested = (("licence", Licence), ("training", Training))
        entry |= {key: _made(kind, entry.get(key), f"{path}: {name}.{key}") for key, kind in nested}
        for key, kind in (("sources", Source), ("figures", Figure)):
            items = entry.get(key) or []
            entry[key] = tuple(_made(kind, item, f"{path}: {name}.{key}") for item in items)
        entry["overrides"] = tuple(entry.get("overrides") or ())
        records[name] = _made(Record, entry, f"{path}: {name}")
        if not records[name].sources:
            raise DataError(f"{path}: {name} has no source: give at least one address.")
    return records


def _made(kind: type, entry: Any, place: str) -> Any:
    """A dataclass from a dict with exactly its fields."""
    expected = {field.name for field in fields(kind)}
    given = set(entry) if isinstance(entry, dict) else set()
    if given != expected:
        raise DataError(
            f"{place} must have exactly the entries {', '.join(sorted(expected))}; "
            f"missing: {', '.join(sorted(expected - given)) or 'none'}, unknown: {', '.join(sorted(given - expected)) or 'none'}."
        )
    return kind(**entry)


def structure_path(name: str) -> Path:
    """The committed file of a structure."""
    return ASSETS / "structures" / f"{name}.txt"


def read_structure(name: str) -> Structure:
    """{name of a tensor: its shape} of a committed structure.

    Raises:
        DataError: the file is missing or has another format.
    """
    path = structure_path(name)
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        return {tensor: tuple(map(int, shape)) for tensor, *shape in lines}
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no list of names and shapes ({error}): write it with tools/pin_zoo.py.") from None


def structure_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The text of a structure file: a line per tensor, its name and its sizes."""
    return "".join(f"{' '.join([name, *map(str, shape)])}\n" for name, shape in sorted(shapes.items()))


RECORDS: dict[str, Record] = {
    name: record for path in sorted(ASSETS.glob("*.json")) for name, record in read_records(path).items()
}
