"""Progress bars: drawn on a terminal; in a file, a line each minute of a long task and nothing of a short one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SECONDS_IN_A_FILE = 60.0


def progress_bar(items: Iterable[Any] | None = None, *, desc: str, **options: Any) -> tqdm:
    """A :class:`tqdm.tqdm`.

    Args:
        items: to iterate over; None: the caller counts with ``update``.
        desc: what is done, such as "reading images".
        options: of tqdm, such as ``total``, ``unit``, ``disable``.
    """
    if not sys.stderr.isatty():
        options |= {"delay": _SECONDS_IN_A_FILE, "mininterval": _SECONDS_IN_A_FILE, "miniters": 1, "ascii": True}
    return tqdm(items, desc=desc, dynamic_ncols=True, **options)
