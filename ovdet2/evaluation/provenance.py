"""How a report was made: command, commit, versions."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = (
    "ovdet2",
    "detectron2",
    "torch",
    "torchvision",
    "numpy",
    "faster-coco-eval",
    "pycocotools",
    "open_clip_torch",
)


def provenance() -> dict[str, Any]:
    """{"command": str, "git_commit": 40 hex digits or None, "git_modified": bool or None, "versions": {name: str}}.

    The commit is that of the checkout the package is imported from; None for an installed package or without git.
    "git_modified" states whether tracked files differ from it.
    """
    commit = _git("rev-parse", "HEAD")
    changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join(sys.argv),
        "git_commit": commit,
        "git_modified": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


def _git(*arguments):
    """Output of a git command on the checkout of this package, without its last newline; None where it fails."""
    root = Path(__file__).resolve().parents[2]
    # A package installed into a folder of another repository's checkout does not belong to it.
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"
