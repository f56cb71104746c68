"""Download a file over HTTP: resumable, checked for its length, never half-written under its final name.

The bytes go to ``<target>.part``; ``<target>.part.json`` holds what identifies the file at the host. The part is renamed
when it is complete. The standard library's client is used: the clients that resume downloads are not among our
requirements, and none of them checks the speed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError, SetupError
from ovdet2.io.files import read_json, write_json
from ovdet2.io.progress import progress_bar

_CHUNK = 1 << 20
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_AGENT = {"User-Agent": "ovdet2", "Accept-Encoding": "identity"}


class DownloadError(SetupError):
    """The host cannot be reached, does not have the file, or stops sending it. The part is kept for the next call."""


@dataclass(frozen=True)
class Patience:
    """When a download is given up.

    Attributes:
        seconds: without any byte; also the span over which the speed is measured.
        bytes_per_second: a lower speed over one span ends the download.
        attempts: successive connections that bring no byte.
    """

    seconds: float = 30.0
    bytes_per_second: float = 1000.0
    attempts: int = 3


def download(url: str, target: str | Path, num_bytes: int | None = None, patience: Patience | None = None) -> Path:
    """Download ``url`` to ``target``, going on with ``<target>.part`` of an earlier call.

    A connection that ends early is opened again where it ended. The part is continued only if the host confirms that the
    file has not changed (its ETag or its date); otherwise the download starts over.

    Args:
        url: https; http for this machine only.
        target: file to write; its folder is created.
        num_bytes: length of the file, if it is known; None: the host must state it.
        patience: when to give up; None: the default values.

    Returns:
        ``target``.

    Raises:
        DownloadError: no connection, an HTTP error, a redirect to another scheme, or the file comes too slowly.
        DataError: the host's file has another length than ``num_bytes``, or the host does not state its length.
        SetupError: the disk is full.
    """
    target, patience = Path(target), patience or Patience()
    _require_scheme(url, url)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    reached = futile = 0
    while True:
        try:
            _receive(url, part, num_bytes, patience)
            break
        except _StartOver:
            _discard(part)
        except _Cut as cut:
            futile = 0 if _size(part) > reached else futile + 1
            reached = max(reached, _size(part))
            if futile >= patience.attempts:
                raise DownloadError(
                    f"{url} ended after {_size(part):,} bytes, and {futile} further connections brought no more ({cut}): run "
                    "the same command later to go on."
                ) from None
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    os.replace(part, target)
    _notes(part).unlink(missing_ok=True)
    return target


class _Cut(Exception):
    """The connection ended before the file did."""


class _StartOver(Exception):
    """The host does not continue the part."""


def _receive(url: str, part: Path, num_bytes: int | None, patience: Patience) -> None:
    """Append what one connection brings to ``part``, until it is complete."""
    known = _read_notes(part, url)
    start = _size(part) if known else 0
    if known and start == known["bytes"]:
        return
    headers = {"Range": f"bytes={start}-", "If-Range": known["validator"]} if known and start else {}
    with _opened(url, headers, patience) as response:
        if known and headers and response.status == 206 and _content_range(response) != (start, known["bytes"]):
            raise _StartOver  # another piece, or a file of another length
        if not headers or response.status == 200:
            if start:
                print(
                    f"{url}: the host does not continue the part of {start:,} bytes, or its file has changed: starting over"
                )
            _discard(part)
            known, start = _begin(url, response, part, num_bytes), 0
        assert known is not None
        total = known["bytes"]
        free = shutil.disk_usage(part.parent).free
        if free < total - start:
            raise SetupError(
                f"{url} needs {(total - start) / 1e9:.2f} GB more, but {free / 1e9:.2f} GB are free in {part.parent}: free "
                "disk space, or set OVDET2_HOME to a folder on another disk."
            )
        _copy(response, part, start, total, patience, url)


def _begin(url, response, part, num_bytes):
    """Check the stated length of a file, and note what identifies it; returns the notes."""
    stated = response.headers.get("Content-Length", "").strip()
    stated = stated if stated.isdecimal() else None
    if stated is None and num_bytes is None:
        raise DataError(
            f"{url}: the host does not state the length, so that a cut would not be noticed: download it by hand."
        )
    total = int(stated) if stated is not None else num_bytes
    if num_bytes is not None and total != num_bytes:
        raise DataError(
            f"{url} has {total:,} bytes, but {num_bytes:,} are expected: the host's file has changed, or the address shows a page "
            "instead of the file."
        )
    etag = response.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")  # a weak ETag cannot be used
    notes = {"url": url, "validator": validator, "bytes": total}
    if validator:  # otherwise the part could not be continued
        write_json(_notes(part), notes)
    return notes


def _copy(response, part, start, total, patience, url):
    """Append the body to ``part``, up to ``total`` bytes."""
    received, window, began = start, 0, time.monotonic()
    bar = progress_bar(desc=part.name.removesuffix(".part"), total=total, initial=start, unit="B", unit_scale=True)
    with bar, open(part, "ab") as file:
        while received < total:
            try:
                block = response.read1(min(_CHUNK, total - received))
            except (OSError, http.client.HTTPException) as error:
                raise _Cut(_reason(error)) from None
            if not block:
                raise _Cut("the connection was closed")
            try:
                file.write(block)
            except OSError as error:
                raise SetupError(f"{part} cannot be written ({error}): free disk space.") from None
            received, window = received + len(block), window + len(block)
            bar.update(len(block))
            elapsed = time.monotonic() - began
            if elapsed >= patience.seconds:
                if window < patience.bytes_per_second * elapsed and received < total:
                    raise DownloadError(
                        f"{url} brings {window / elapsed:.0f} bytes per second: the part of {received:,} bytes is kept; run the "
                        "same command later to go on."
                    )
                window, began = 0, time.monotonic()


@contextlib.contextmanager
def _opened(url: str, headers: dict[str, str], patience: Patience) -> Generator[Any, None, None]:
    """The response of the host.

    Raises:
        DownloadError: no connection, or the host refuses.
    """
    opener = urllib.request.build_opener(_SameScheme)
    try:
        response = opener.open(urllib.request.Request(url, headers=_AGENT | headers), timeout=patience.seconds)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and headers:  # the part is longer than the host's file
            raise _StartOver from None
        raise DownloadError(f"{url}: the host answers {error.code} {error.reason}.") from None
    except urllib.error.URLError as error:
        raise DownloadError(f"{url} cannot be reached ({_reason(error.reason)}).") from None
    except (OSError, http.client.HTTPException) as error:  # while the answer is read
        raise _Cut(_reason(error)) from None
    with response:
        yield response


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to another scheme, nor to a file of this machine."""

    def http_error_302(self, req, fp, code, msg, headers):  # pyrefly: ignore[bad-override]  the base is untyped
        place = headers.get("Location") or headers.get("URI")
        if place is not None:
            try:
                _require_scheme(urllib.parse.urljoin(req.full_url, place), req.full_url)
            except ValueError as error:  # of urllib.parse
                fp.close()
                raise DownloadError(f"{req.full_url} redirects to {place!r}, which is no address ({error}).") from None
            except DownloadError:
                fp.close()
                raise
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302  # pyrefly: ignore[bad-override]


def _require_scheme(url: str, source: str) -> None:
    """Check the scheme of an address that is opened; http is for this machine only."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https" or (
        parts.scheme == "http" and parts.hostname in _LOOPBACK and source.startswith("http:")
    ):
        return
    what = f"{source} redirects to {url}" if url != source else url
    raise DownloadError(f"{what}: only https addresses are opened.")


def _content_range(response) -> tuple[int, int | None]:
    """(first byte, length of the file) of a partial answer; (-1, None) if it is not stated."""
    try:
        span, total = response.headers.get("Content-Range", "").removeprefix("bytes ").split("/")
        return int(span.split("-")[0]), int(total)
    except ValueError:
        return -1, None


def _read_notes(part: Path, url: str) -> dict[str, Any] | None:
    """What is known of a part; None if there is none, or if it is of another address."""
    try:
        notes = read_json(_notes(part))
        usable = notes["url"] == url and isinstance(notes["bytes"], int) and isinstance(notes["validator"], str)
    except (DataError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return notes if usable and _size(part) <= notes["bytes"] else None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


def _notes(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _reason(error: object) -> str:
    if isinstance(error, (TimeoutError, socket.timeout)):
        return "nothing came in time"
    return str(error) or type(error).__name__
