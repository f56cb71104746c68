"""Peak memory of some work, in MiB, as measured by the process that does it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from ovdet2.errors import SetupError

MIB = 2**20


def peak_above(work: Callable[[], object], device: str = "cpu") -> float:
    """Peak MiB of ``work``, above what is in use before it.

    On CUDA that is what torch allocates. On a CPU it is resident memory; call it in a process that has done little else,
    since memory that was freed but kept by the allocator would be used again without being counted.

    Raises:
        SetupError: a CPU whose system is not Linux with glibc.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present value
    except (OSError, AttributeError) as error:
        raise SetupError(f"peak memory is measured on Linux with glibc only ({error}): give --no-memory.") from None
    before = high_water()
    work()
    return high_water() - before


def high_water() -> float:
    """Peak resident MiB of this process; getrusage would start from the peak of the process that started it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
