"""Who works on what, when several processes or machines share a folder: lock files with an owner and a heartbeat."""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

HEARTBEAT_SECONDS = 15.0
# A file system shared by machines may show a heartbeat late; within one machine the death of an owner is seen at once.
STALE_SECONDS = 180.0


class Claims:
    """Claims on named pieces of work in one folder.

    A claim is a file ``<name>.lock`` that holds its owner (host, process, a random mark) and is touched every
    :data:`HEARTBEAT_SECONDS` by a thread. It is taken over when its owner's process is gone (same host) or when its
    heartbeat has not moved for ``stale_seconds`` of this process's own clock: clocks of machines need not agree.

    Two processes may, in a race of microseconds, take over the same dead claim and both do the work. The work must
    therefore be written atomically and not depend on who does it.
    """

    def __init__(self, folder, stale_seconds=STALE_SECONDS):
        """
        Args:
            folder: existing folder that all workers see.
            stale_seconds: silence after which an owner on another machine is given up.
        """
        self.folder = Path(folder)
        self.stale_seconds = stale_seconds
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "mark": uuid.uuid4().hex}
        self._watched = {}  # name -> (what was seen of the claim, own time when it was first seen so)
        self._held = set()
        self._stop = threading.Event()
        self._thread = None

    def __enter__(self):
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        for name in sorted(self._held):
            self.release(name)

    def take(self, name):
        """Claim ``name``. Returns False where a living owner has it."""
        path = self._path(name)
        if self._create(path):
            self._held.add(name)
            return True
        dead = self._dead_owner(name, path)
        if dead is None:
            return False
        self._remove_traces(dead, path)
        if not self._create(path):
            return False
        self._held.add(name)
        return True

    def release(self, name):
        """Give up a claim of ours; one that was taken over meanwhile is left to its new owner."""
        self._held.discard(name)
        if self._read(self._path(name)) == self._owner:
            self._path(name).unlink(missing_ok=True)

    def sweep(self):
        """Remove the temporary files of workers long dead; call it when the work is done."""
        for left in self.folder.glob(".*.tmp"):
            try:
                if time.time() - left.stat().st_mtime > 10 * self.stale_seconds:
                    left.unlink()
            except FileNotFoundError:
                continue  # its owner, or another sweep, was faster

    def _path(self, name):
        return self.folder / f"{name}.lock"

    def _create(self, path):
        """Write the claim in full beside its place, then link it there, which fails if there is one."""
        draft = path.with_name(f".{path.name}.{self._owner['pid']}-{self._owner['mark']}.tmp")
        draft.write_text(json.dumps(self._owner))
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _dead_owner(self, name, path):
        """The owner of a claim that may be taken over, {} for one that cannot be read; None while it lives."""
        try:
            seen = (path.read_bytes(), path.stat().st_mtime_ns)
        except FileNotFoundError:
            return {}
        owner = self._read(path) or {}
        if owner.get("host") == self._owner["host"] and not _is_running(owner.get("pid")):
            return owner
        before, since = self._watched.get(name, (None, 0.0))
        if before != seen:
            self._watched[name] = (seen, time.monotonic())
            return None
        return owner if time.monotonic() - since > self.stale_seconds else None

    def _remove_traces(self, owner, path):
        """Remove a dead claim and the temporary files its owner left in the folder (see files.atomic_path)."""
        aside = path.with_name(f".{path.name}.{self._owner['mark']}.dead")
        try:
            os.rename(path, aside)  # of several that see it dead, one succeeds
        except FileNotFoundError:
            return
        aside.unlink()
        if isinstance(owner.get("pid"), int):
            for left in self.folder.glob(f".{path.stem}*.{owner['pid']}-*.tmp"):
                left.unlink(missing_ok=True)

    def _beat(self):
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for name in tuple(self._held):
                try:
                    os.utime(self._path(name))
                except OSError:
                    continue  # trouble of the file system: if it lasts, another takes over, which does no harm

    @staticmethod
    def _read(path):
        try:
            owner = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None


def _is_running(pid):
    """Whether a process of this machine exists."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
