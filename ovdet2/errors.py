"""The exceptions of ovdet2, each with an exit code.

A message names the faulty id, path or shape and ends with the remedy. Command-line programs run inside
:func:`exit_on_error`, so a user sees the message and a documented exit code instead of a traceback.
"""

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Generator, Iterable


class OVDetError(Exception):
    """Base class of errors that a user can fix. ``exit_code`` is the exit code of command-line programs."""

    exit_code = 1


class UsageError(OVDetError, ValueError):
    """A wrong argument, configuration key or vocabulary given by the user."""

    exit_code = 2


class DataError(OVDetError, ValueError):
    """A missing, damaged or mismatched file, annotation or artefact."""

    exit_code = 3


class CacheError(DataError):
    """An offline artefact that is incomplete, damaged, or of another data set or teacher.

    It always stops a training run; other DataErrors of images are tolerated up to DATALOADER.MAX_BAD_IMAGES.
    """


class SetupError(OVDetError, RuntimeError):
    """A missing or incompatible library or device, or too little disk space."""

    exit_code = 4


class NumericalError(OVDetError, FloatingPointError):
    """A loss, gradient or box that is not finite."""

    exit_code = 5


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images", "1,000 images"; ``noun`` in the singular."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" for the known word that is spelt most like ``word``, or "" if none is."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def full_disk(error: OSError) -> SetupError | None:
    """The error of a file system that takes no more data, in one sentence; None for another error."""
    reasons = {
        errno.ENOSPC: "is full",
        errno.EDQUOT: "has no quota left",
        errno.EROFS: "is read-only",
        errno.EFBIG: "refuses a file of this size",
    }
    if error.errno not in reasons:
        return None
    place = f"writing {error.filename}: " if error.filename else ""
    return SetupError(
        f"{place}the file system {reasons[error.errno]} ({os.strerror(error.errno)}): free space, or choose another folder; files written before are "
        "complete."
    )


@contextlib.contextmanager
def exit_on_error() -> Generator[None, None, None]:
    """Print the message of an :class:`OVDetError` to stderr and exit with its code (OVDET2_DEBUG=1: traceback).

    Ctrl-C ends with code 130, without a traceback; a full disk, wherever it was met, with that of a SetupError.
    """
    try:
        yield
    except OSError as error:
        full = full_disk(error)
        if full is None or os.environ.get("OVDET2_DEBUG"):
            raise
        print(f"SetupError: {full}", file=sys.stderr)
        sys.exit(full.exit_code)
    except KeyboardInterrupt:
        if os.environ.get("OVDET2_DEBUG"):
            raise
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except OVDetError as error:
        if os.environ.get("OVDET2_DEBUG"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
