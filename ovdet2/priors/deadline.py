"""HTTP calls with one deadline for all of it. Python's time-out is for a single wait: a server that sends a byte now and
then, endless "100 Continue" lines or chunk extensions would outlast it.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.request
from collections.abc import Generator
from typing import Any

_call = threading.local()


class _Deadline:
    """Shuts down the sockets of a call when its time is over, so that every wait on them ends."""

    def __init__(self) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()

    def watch(self, connection: socket.socket) -> None:
        """A socket of this call."""
        with self._lock:
            self._sockets.append(connection)
            if self.passed:
                _shut(connection)

    def expire(self) -> None:
        """The time is over."""
        with self._lock:
            self.passed = True
            for connection in self._sockets:
                _shut(connection)


@contextlib.contextmanager
def within(seconds: float) -> Generator[None, None, None]:
    """Limit the calls of this thread, by an opener with :func:`handlers`, to ``seconds`` in all.

    Raises:
        TimeoutError: at the end of the block, in place of what the closed connection raised.
    """
    deadline = _call.deadline = _Deadline()
    timer = threading.Timer(seconds, deadline.expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError):
        if not deadline.passed:
            raise
    finally:
        timer.cancel()
        _call.deadline = None
    if deadline.passed:
        raise TimeoutError(f"no complete reply within {seconds:g} s")


def handlers() -> list[urllib.request.BaseHandler]:
    """Handlers of http and https for ``urllib.request.build_opener`` whose connections keep to the deadline."""
    return [_HTTPHandler(), _HTTPSHandler()]


class _Watched:
    """Of a connection: states its socket to the deadline of the call."""

    sock: Any

    def connect(self) -> None:
        super().connect()  # pyrefly: ignore[missing-attribute]  of http.client's class, which follows
        deadline = getattr(_call, "deadline", None)
        if deadline is not None:
            deadline.watch(self.sock)


class _Connection(_Watched, http.client.HTTPConnection):
    pass


class _SecureConnection(_Watched, http.client.HTTPSConnection):
    pass


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req)


def _shut(connection):
    with contextlib.suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)
