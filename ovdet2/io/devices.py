"""Names of devices, checked before anything slow begins."""

from __future__ import annotations

import re

import torch

from ovdet2.errors import SetupError, UsageError

_FORM = '"cpu", "cuda" or a numbered GPU such as "cuda:0"'


def require_device(device: str | torch.device, option: str) -> None:
    """Refuse a device that ovdet2 does not run on, or that this machine does not have.

    Args:
        device: such as "cpu", "cuda", "cuda:1".
        option: key or option that names it, for the message.

    Raises:
        UsageError: something else, such as "gpu" or "mps".
        SetupError: a GPU that is not there.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(device))
    if match is None:
        apple = " Apple's GPUs lack operations that detectors need." if str(device).startswith("mps") else ""
        raise UsageError(f"{option} is {str(device)!r}, which is no device that ovdet2 runs on.{apple} Choose {_FORM}.")
    if str(device) == "cpu":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= count:
        there = (
            f"the {count} GPUs of this machine are numbered from 0" if count else "this machine has no GPU with CUDA"
        )
        raise SetupError(f"{option} is {str(device)!r}, but {there}: choose {_FORM}.")
