"""Lock files with an owner and a heartbeat, by which processes or machines that share a folder divide the work."""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

HEARTBEAT_SECONDS = 15.0
# A network file system may show a heartbeat late. Within one machine a dead owner is detected by its process id.
STALE_SECONDS = 180.0


class Claims:
    """Claims (locks) on named pieces of work in one folder.

    A claim is a file ``<name>.lock`` that holds its owner (machine, process, a random mark). A thread of the owner
    touches it every :data:`HEARTBEAT_SECONDS`. Another process takes it over if the owner's process has ended (same
    machine), or if the heartbeat has not changed for ``stale_seconds`` of the other process's clock: the clocks of
    machines need not agree.

    In rare cases two processes do the same work: in a race of microseconds for a dead claim, or if an owner was
    suspended and resumes. The work must therefore be written atomically and not depend on the process that does it.
    """

    def __init__(self, folder: str | Path, stale_seconds: float = STALE_SECONDS) -> None:
        """
        Args:
            folder: existing folder that all processes share.
            stale_seconds: seconds without a heartbeat after which the claim of another machine is taken over.
        """
        self.folder = Path(folder)
        self.stale_seconds = stale_seconds
        self._owner = {"machine": _machine(), "pid": os.getpid(), "mark": uuid.uuid4().hex}
        self._watched = {}  # name -> ((content, mtime) of the claim, own time at which they were first read)
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
        """Claim ``name``. Returns False if a running process owns it."""
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
        """Remove a claim of this process; one that another process has taken over stays."""
        self._held.discard(name)
        if self._read(self._path(name)) == self._owner:
            self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove old temporary files (see :func:`~ovdet2.io.files.atomic_path`); call it when the work is done."""
        probe = self.folder / f".{self._owner['mark']}.probe"
        probe.touch()  # the time by the clock of the file system
        now = probe.stat().st_mtime
        probe.unlink()
        for left in self.folder.glob(".*.tmp"):
            try:
                if now - left.stat().st_mtime > 10 * self.stale_seconds:
                    left.unlink()
            except FileNotFoundError:
                continue  # its owner, or another sweep, has removed it

    def _path(self, name):
        return self.folder / f"{name}.lock"

    def _create(self, path):
        """Write the claim to a temporary file, then link it to its path, which fails if there is one."""
        draft = path.with_name(f".{path.stem}.lock.{self._owner['pid']}-{self._owner['mark']}.tmp")
        draft.write_text(json.dumps(self._owner))
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links; another process may read the claim half written
            try:
                with open(path, "x") as claim:
                    claim.write(json.dumps(self._owner))
            except FileExistsError:
                return False
        finally:
            draft.unlink()
        return True

    def _is_dead(self, name, path):
        """Whether a claim may be taken over. Removes the temporary files of an owner whose process has ended."""
        try:
            seen = (path.read_bytes(), path.stat().st_mtime_ns)
        except FileNotFoundError:
            return True
        owner = self._read(path) or {}
        is_here = owner.get("machine") == self._owner["machine"] and isinstance(owner.get("pid"), int)
        if is_here and not is_running(owner["pid"]):
            for left in self.folder.glob(f".{path.stem}.*{owner['pid']}-*.tmp"):
                left.unlink(missing_ok=True)
            return True
        # A running process may hang, or be another process with that id: the heartbeat decides.
        before, since = self._watched.get(name, (None, 0.0))
        if before != seen:
            self._watched[name] = (seen, time.monotonic())
            return False
        return time.monotonic() - since > self.stale_seconds

    def _remove(self, path):
        aside = path.with_name(f".{path.name}.{self._owner['mark']}.dead")
        try:
            os.rename(path, aside)  # of several processes that find it dead, one succeeds
        except FileNotFoundError:
            return
        aside.unlink()

    def _beat(self):
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for name in tuple(self._held):
                try:
                    os.utime(self._path(name))
                except OSError:
                    continue  # if the file system keeps failing, another process takes over, which is harmless

    @staticmethod
    def _read(path):
        try:
            owner = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return owner if isinstance(owner, dict) else None


def _machine():
    """Identifies this machine; containers with separate process ids count as separate machines."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    except OSError:
        pass  # not Linux: the host name only
    return " ".join(parts)


def is_running(pid: int) -> bool:
    """Whether a process of this machine runs; an ended one may still be listed until its parent waits for it."""
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
