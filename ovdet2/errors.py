"""Errors that tell the user what to do next, each with the exit code of its kind.

A message names the id, path or shape at fault and ends with the remedy. Command-line programs wrap their
body in :func:`exit_on_error`, so a user sees one plain sentence and a documented exit code instead of a traceback.
"""

import contextlib
import os
import sys
from collections.abc import Generator


class OVDetError(Exception):
    """Base of the errors a user can mend. ``exit_code`` is what the command-line programs return."""

    exit_code = 1


class UsageError(OVDetError, ValueError):
    """A wrong argument, configuration key or vocabulary given by the user."""

    exit_code = 2


class DataError(OVDetError, ValueError):
    """A missing, damaged or mismatched file, annotation or artefact."""

    exit_code = 3


class CacheError(DataError):
    """An offline artefact that is incomplete, damaged or of something else: a run stops at it, however many unreadable
    images it may skip."""


class SetupError(OVDetError, RuntimeError):
    """A missing or mismatched library, device, or too little disk."""

    exit_code = 4


class NumericalError(OVDetError, FloatingPointError):
    """A loss, gradient or box that is not finite."""

    exit_code = 5


@contextlib.contextmanager
def exit_on_error() -> Generator[None, None, None]:
    """Turn an :class:`OVDetError` into its message on stderr and its exit code (a traceback with OVDET2_DEBUG=1)."""
    try:
        yield
    except OVDetError as error:
        if os.environ.get("OVDET2_DEBUG"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
