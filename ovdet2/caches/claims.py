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

    A claim is a file ``<name>.lock`` that holds its owner (machine, process, a random mark) and is touched every
    :data:`HEARTBEAT_SECONDS` by a thread. It is taken over when its owner's process is gone (same machine) or when its
    heartbeat has not moved for ``stale_seconds`` of this process's own clock: clocks of machines need not agree.

    Two processes may do the same work: in a race of microseconds for a dead claim, or when an owner was suspended and
    wakes up. The work must therefore be written atomically and not depend on who does it.
    """

    def __init__(self, folder: str | Path, stale_seconds: float = STALE_SECONDS) -> None:
        """
        Args:
            folder: existing folder that all workers see.
            stale_seconds: silence after which an owner on another machine is given up.
        """
        self.folder = Path(folder)
        self.stale_seconds = stale_seconds
        self._owner = {"machine": _machine(), "pid": os.getpid(), "mark": uuid.uuid4().hex}
        self._watched = {}  # name -> (what was seen of the claim, own time when it was first seen so)
        self._held = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Claims":
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for name in sorted(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Claim ``name``. Returns False where a living owner has it."""
        path = self._path(name)
        if self._create(path):
            self._held.add(name)
            return True
        if not self._is_dead(name, path):
            return False
        self._remove(path)
        if not self._create(path):
            return False
        self._held.add(name)
        return True

    def release(self, name: str) -> None:
        """Give up a claim of ours; one that was taken over meanwhile is left to its new owner."""
        self._held.discard(name)
        if self._read(self._path(name)) == self._owner:
            self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove temporary files (see files.atomic_path) of long ago; call it when the work is done."""
        probe = self.folder / f".{self._owner['mark']}.probe"
        probe.touch()  # the time as the file system has it
        now = probe.stat().st_mtime
        probe.unlink()
        for left in self.folder.glob(".*.tmp"):
            try:
                if now - left.stat().st_mtime > 10 * self.stale_seconds:
                    left.unlink()
            except FileNotFoundError:
                continue  # its owner, or another sweep, was faster

    def _path(self, name):
        return self.folder / f"{name}.lock"

    def _create(self, path):
        """Write the claim in full beside its place, then link it there, which fails if there is one."""
        draft = path.with_name(f".{path.stem}.lock.{self._owner['pid']}-{self._owner['mark']}.tmp")
        draft.write_text(json.dumps(self._owner))
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links; a reader may meet the claim half written
            try:
                with open(path, "x") as claim:
                    claim.write(json.dumps(self._owner))
            except FileExistsError:
                return False
        finally:
            draft.unlink()
        return True

    def _is_dead(self, name, path):
        """Whether a claim may be taken over. The temporary files of an owner that is surely gone are removed."""
        try:
            seen = (path.read_bytes(), path.stat().st_mtime_ns)
        except FileNotFoundError:
            return True
        owner = self._read(path) or {}
        is_here = owner.get("machine") == self._owner["machine"] and isinstance(owner.get("pid"), int)
        if is_here and not _is_running(owner["pid"]):
            for left in self.folder.glob(f".{path.stem}.*{owner['pid']}-*.tmp"):
                left.unlink(missing_ok=True)
            return True
        # One that seems to run may hang, or be another process of that number: its heart must beat, too.
        before, since = self._watched.get(name, (None, 0.0))
        if before != seen:
            self._watched[name] = (seen, time.monotonic())
            return False
        return time.monotonic() - since > self.stale_seconds

    def _remove(self, path):
        aside = path.with_name(f".{path.name}.{self._owner['mark']}.dead")
        try:
            os.rename(path, aside)  # of several that see it dead, one succeeds
        except FileNotFoundError:
            return
        aside.unlink()

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


def _machine():
    """What tells machines apart, containers with process numbers of their own among them."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:
        pass  # not Linux: the name must do
    return " ".join(parts)


def _is_running(pid):
    """Whether a process of this machine runs; one that has ended may exist until its parent takes note."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return pid > 0
