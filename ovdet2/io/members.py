"""Addresses of members of uncompressed tar files, used instead of a path: ``000.tar#12@1536+20480``.

This example is sample 12 of the file 000.tar, the 20,480 bytes from byte 1,536 on. Any process can read a record with
such a file name without the reader that made it.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from ovdet2.errors import DataError

_ADDRESS = re.compile(r"(?s)(?P<tar>.+)#\d+@(?P<start>\d+)\+(?P<size>\d+)")


def member_address(tar: str | Path, number: int, start: int, size: int) -> str:
    """Make the address of a member.

    Args:
        tar: the file.
        number: of the sample in it, for information only.
        start, size: of the member's content in bytes.
    """
    return f"{tar}#{number}@{start}+{size}"


def open_member(address: str | Path) -> io.BytesIO | None:
    """The content of a member; None if ``address`` is a path and not an address.

    Raises:
        DataError: the tar file is missing or ends too early.
    """
    match = _ADDRESS.fullmatch(str(address))
    if match is None or _is_file(address):
        return None
    start, size = int(match["start"]), int(match["size"])
    try:
        content = read_bytes(match["tar"], start, size)
    except OSError as error:
        raise DataError(f"the shard of {address} cannot be read ({error.strerror}): restore the file.") from None
    if len(content) < size:
        raise DataError(f"the shard of {address} ends before the image does: it was changed; download it again.")
    return io.BytesIO(content)


def _is_file(path):
    try:
        return Path(path).is_file()
    except OSError:  # a name that is too long, a folder without permission
        return False


def read_bytes(path: str | Path, start: int, size: int) -> bytes:
    """``size`` bytes of a file from ``start`` on; fewer at its end."""
    with open(path, "rb") as handle:
        handle.seek(start)
        return handle.read(size)
