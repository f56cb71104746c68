"""Find values that are not finite in the state of a training."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

_SHOWN = 3


def not_finite(state: Any, prefix: str = "") -> list[str]:
    """The names, such as "optimizer.state.0.exp_avg", of floating-point tensors that hold NaN or an infinity.

    Args:
        state: nested dicts, lists and tuples; other values are skipped.
        prefix: of the names.
    """
    tensors = list(_tensors(state, prefix))
    # One transfer from the GPU per device, not one per tensor.
    bad: list[str] = []
    for device in {tensor.device for _, tensor in tensors}:
        own = [(name, tensor) for name, tensor in tensors if tensor.device == device]
        flags = torch.stack([tensor.isfinite().all() for _, tensor in own]).tolist()
        bad += [name for (name, _), finite in zip(own, flags) if not finite]
    return sorted(bad)


def listed(names: Sequence[str]) -> str:
    """ "3 entries (a, b, c)"."""
    shown = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
    return f"{len(names)} {'entry' if len(names) == 1 else 'entries'} ({shown})"


def _tensors(state: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(state, torch.Tensor):
        if state.is_floating_point():
            yield prefix, state.detach()
        return
    pairs: Any = ()
    if isinstance(state, Mapping):
        pairs = state.items()
    elif isinstance(state, list | tuple):
        pairs = enumerate(state)
    for key, value in pairs:
        yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
