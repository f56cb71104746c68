"""The zoo on this machine: ``$OVDET2_HOME/zoo/<name>/`` holds converted weights and a manifest, or nothing.

Three levels of trust are printed:

- *structure*: names and shapes of all tensors equal the committed list. Every file must reach it.
- *first use*: besides, the SHA-256 of the file is kept in the manifest; a file of another hash is refused later.
- *pinned*: besides, the SHA-256 equals that of the record.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovdet2.config.load import load_config
from ovdet2.errors import DataError, SetupError, UsageError
from ovdet2.io.download import DownloadError, Patience, download
from ovdet2.io.files import read_json, sha256_file, write_json, write_safetensors
from ovdet2.io.weights import read_weights
from ovdet2.zoo.records import Record, Source, Structure, read_structure, weights_path

SCHEMA = "ovdet2/zoo-entry/1"
STRUCTURE, FIRST_USE, PINNED = "structure", "first use", "pinned"
_ENTRIES = {"origin", "source_sha256", "weights_sha256", "weights_bytes"}  # of a manifest
_SHOWN = 8  # names in a message


def manifest_path(record: Record) -> Path:
    """The manifest of a record on this machine."""
    return weights_path(record.name).with_name("manifest.json")


def read_manifest(record: Record) -> dict[str, Any] | None:
    """The manifest of a record; None if it was never fetched or imported.

    Raises:
        DataError: the manifest is damaged.
    """
    path = manifest_path(record)
    if not path.is_file():
        return None
    manifest = read_json(path, f"delete {path.parent} and fetch {record.name} again")
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or not _ENTRIES <= manifest.keys():
        raise DataError(
            f"{path} is no manifest of the schema {SCHEMA!r}: delete {path.parent} and fetch {record.name} again."
        )
    return manifest


def is_here(record: Record) -> bool:
    """Whether the converted weights are on this machine and have the length of the manifest."""
    manifest, path = read_manifest(record), weights_path(record.name)
    return manifest is not None and path.is_file() and path.stat().st_size == manifest["weights_bytes"]


def trust_of(record: Record) -> str:
    """The level of trust of a record: what its file on this machine has reached, or would reach without one."""
    manifest = read_manifest(record)
    if manifest is not None:
        return PINNED if manifest["source_sha256"] in _pins(record) else FIRST_USE
    return PINNED if record.pinned else STRUCTURE


def fetch(record: Record, accept_license: bool = False, patience: Patience | None = None) -> Path:
    """The converted weights of a record; they are downloaded and converted unless they are on this machine.

    Args:
        record: of the zoo.
        accept_license: the user accepts a licence that forbids commercial use.
        patience: when to give a download up.

    Returns:
        A path for MODEL.WEIGHTS.

    Raises:
        UsageError: the licence must be accepted.
        SetupError: the file cannot be downloaded; the message has its address, the path to put it to and the import command.
        DataError: the file is not the record's.
    """
    path = weights_path(record.name)
    if _is_usable(record):  # without the lock: the folder may be read-only
        return path
    with _only_process(record):
        if _is_usable(record):  # another process has fetched it meanwhile
            return path
        _require_licence(record, accept_license)
        for source in record.sources:
            placed = path.with_name(source.file_name)
            if placed.is_file() and not source.by_hand:  # put there by the user
                _install(record, placed, source.url, _pins_of(source))
                return path
        source = next((source for source in record.sources if not source.by_hand), None)
        if source is None:
            raise SetupError(by_hand(record))
        try:
            file = download(source.url, path.with_name(source.file_name), source.bytes, patience)
        except DownloadError as error:
            raise SetupError(
                f"{error} Without network: download {source.url} elsewhere, then put it to {path.with_name(source.file_name)}, "
                f"or run: ovdet2 zoo import {record.name} FILE"
            ) from None
        try:
            _install(record, file, source.url, _pins_of(source))
        except DataError:
            file.unlink()
            raise
        # After another error, such as a full disk, the next call converts the file without a download.
        file.unlink()
    return path


def by_hand(record: Record) -> str:
    """How to get a file that no program can download."""
    return (
        f"{record.name}: download {record.sources[0].url} by hand, in a browser (of a folder, the file of: {record.title}); "
        f"then run: ovdet2 zoo import {record.name} FILE"
    )


def import_file(record: Record, file: str | Path, accept_license: bool = False) -> Path:
    """Convert a file of the user, from any of the record's places, into the zoo; the file stays where it is.

    Raises:
        UsageError: the licence must be accepted.
        DataError: the file is missing, unreadable, not the record's, or not the file that was used first.
    """
    if not Path(file).is_file():
        raise DataError(f"{file} does not exist: give the path of the downloaded file.")
    with _only_process(record):
        _require_licence(record, accept_license)
        _install(record, Path(file), Path(file).name, _pins(record) if record.pinned else None)
    return weights_path(record.name)


def verify(record: Record) -> str:
    """Check the weights of a record on this machine again: hash, names and shapes.

    Returns:
        The level of trust.

    Raises:
        DataError: they have changed since they were converted, or the record has.
    """
    manifest, path = read_manifest(record), weights_path(record.name)
    if manifest is None or not path.is_file():
        raise DataError(f"{path} does not exist: run ovdet2 zoo fetch {record.name}.")
    if sha256_file(path) != manifest["weights_sha256"]:
        raise DataError(f"{path} has changed since it was converted: delete it and run ovdet2 zoo fetch {record.name}.")
    _require_pinned(record, manifest)
    _require_structure(record, read_weights(path)["model"])
    return trust_of(record)


def _is_usable(record: Record) -> bool:
    """Whether the weights are on this machine.

    Raises:
        DataError: they are, but of another file than the pinned one, or the manifest is damaged.
    """
    if not is_here(record):
        return False
    _require_pinned(record, read_manifest(record))
    return True


def _require_pinned(record: Record, manifest: Mapping[str, Any] | None) -> None:
    """Refuse weights that were fetched before their record was pinned, if they are of another file.

    Raises:
        DataError: they are.
    """
    assert manifest is not None  # the weights are here
    if record.pinned and manifest["source_sha256"] not in _pins(record):
        raise DataError(
            f"{record.name} was made from a file of SHA-256 {manifest['source_sha256']}, which is not the pinned one: delete "
            f"{weights_path(record.name).parent} and run ovdet2 zoo fetch {record.name}."
        )


def _install(record: Record, file: Path, origin: str, pins: set[str] | None) -> None:
    """Check a file, convert it, and write weights and manifest; the manifest, last, makes the entry valid.

    ``pins``: the hashes that the file may have; None: any.
    """
    source_sha256 = sha256_file(file)
    if pins and source_sha256 not in pins:
        raise DataError(
            f"{file} has SHA-256 {source_sha256}, but the record of {record.name} has {' or '.join(sorted(pins))}: it is another file, "
            "and was not opened."
        )
    earlier = read_manifest(record)
    if earlier is not None and earlier["source_sha256"] != source_sha256:
        raise DataError(
            f"{file} has SHA-256 {source_sha256}, but {record.name} was first used with {earlier['source_sha256']} "
            f"({earlier['origin']}): it has changed, and was not opened. If the change is intended, delete {manifest_path(record)}."
        )
    tensors = check_file(record, file)
    path = weights_path(record.name)
    manifest = {"schema": SCHEMA, "name": record.name, "origin": origin, "source_sha256": source_sha256}
    write_safetensors(path, tensors, manifest)
    manifest |= {"source_bytes": file.stat().st_size, "tensors": len(tensors)}
    manifest |= {"weights_sha256": sha256_file(path), "weights_bytes": path.stat().st_size}
    write_json(manifest_path(record), manifest | {"licence": str(record.licence)}, indent=1)
    print(f"{record.name}: {len(tensors)} tensors in {path}")
    print(f"Trust: {describe(trust_of(record), source_sha256)}")


def check_file(record: Record, file: Path) -> dict[str, Tensor]:
    """The tensors for MODEL.WEIGHTS of a published file, compared with the committed structure.

    Raises:
        DataError: the file is unreadable, or not the record's.
    """
    tensors = convert(record, _weights_of(file))
    _require_structure(record, tensors)
    return tensors


def describe(trust: str, source_sha256: str = "") -> str:
    """A level of trust in a sentence."""
    reached = {
        STRUCTURE: "names and shapes of all tensors will be compared with the committed list",
        FIRST_USE: f"names and shapes equal the committed list; SHA-256 {source_sha256} is kept, a change will be refused",
        PINNED: f"names and shapes equal the committed list, and SHA-256 {source_sha256} equals the record's",
    }
    return f"{trust} ({reached[trust]})"


def convert(record: Record, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors for MODEL.WEIGHTS from the weights of a published file.

    Raises:
        DataError: the converter does not know a name, or misses one.
    """
    module, function = record.converter.split(":")
    cfg = load_config(record.config, record.overrides)
    return getattr(importlib.import_module(module), function)(weights, cfg, **record.options)


def structure_of(tensors: Mapping[str, Tensor]) -> Structure:
    """{name: shape} of converted tensors, without the vocabulary, whose sizes depend on the words."""
    return {name: tuple(value.shape) for name, value in tensors.items() if "vocabulary" not in name.split(".")}


def _require_structure(record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Compare names and shapes with the committed list.

    Raises:
        DataError: a tensor is missing, unknown or of another shape; the message names it.
    """
    expected, found = read_structure(record.structure), structure_of(tensors)
    shapes = [
        f"{name} {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults = [
        ("missing", [name for name in expected if name not in found]),
        ("unknown", [name for name in found if name not in expected]),
        ("of another shape", shapes),
    ]
    text = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in faults
        if names
    )
    if text:
        raise DataError(f"the tensors are not those of {record.name}: {text}.")


def _weights_of(file: Path) -> dict[str, Tensor]:
    """The weights of a file of the user, which may be anything.

    Raises:
        DataError: an HTML page, a damaged file, one that could run code, or one with entries that are no tensors.
    """
    with open(file, "rb") as handle:
        head = handle.read(256).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(
            f"{file} is an HTML page, not weights: open the address in a browser, and save the file that it offers."
        )
    weights = read_weights(file)["model"]
    if not isinstance(weights, Mapping) or not weights:
        raise DataError(f"{file} holds no weights: download it again.")
    try:
        return {str(name): torch.as_tensor(value) for name, value in weights.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{file} has entries that are no tensors ({error}): it is no file of weights.") from None


def _require_licence(record: Record, accepted: bool) -> None:
    """Print the licence, when the weights come to this machine.

    Raises:
        UsageError: it forbids commercial use, and was not accepted.
    """
    if read_manifest(record) is None:
        print(f"{record.name}: licences: {record.licence}")
    if record.licence.non_commercial and not accepted:
        raise UsageError(
            f"the weights of {record.name} must not be used commercially ({record.licence.weights}): to accept that, give "
            "--accept-license, or accept_license=True in Python."
        )


def _pins(record: Record) -> set[str]:
    return {source.sha256 for source in record.sources if source.sha256}


def _pins_of(source: Source) -> set[str] | None:
    return {source.sha256} if source.sha256 else None


@contextlib.contextmanager
def _only_process(record: Record) -> Generator[None, None, None]:
    """Wait until no other process works on the record."""
    folder = weights_path(record.name).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise SetupError(f"{folder} cannot be written ({error.strerror}): set OVDET2_HOME to another folder.") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
