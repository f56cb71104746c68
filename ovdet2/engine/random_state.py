"""The random states of a process as plain tensors and numbers, so that a checkpoint can hold them."""

import contextlib
import random
from collections.abc import Generator
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of python's, numpy's, torch's and the CUDA generators: a dict of tensors, numbers and tuples."""
    numpy_state = np.random.get_state()
    assert isinstance(numpy_state, tuple)  # a dict only on request
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def preserved_random_state() -> Generator[None, None, None]:
    """What runs inside may draw random numbers without changing those drawn afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
