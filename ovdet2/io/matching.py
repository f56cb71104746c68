"""Match the weights of a published file with those of a detector, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ovdet2.errors import DataError

_SHOWN = 5  # entries named in an error message


def matched_weights(renamed: Mapping[str, tuple[str, Tensor]], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a file under the detector's names; each has to be there, and nothing else.

    Args:
        renamed: {the detector's name: (name in the file, tensor)}.
        expected: {name: tensor of the right shape}, possibly without storage.

    Returns:
        {name: tensor}, copies: safetensors refuses tied or sliced tensors, which share storage.

    Raises:
        DataError: an entry is unknown, missing, or of another shape; the message names the first ones.
    """
    unknown = [name for ours, (name, _) in renamed.items() if ours not in expected]
    missing = [name for name in expected if name not in renamed]
    misshaped = [
        f"{name} ({list(value.shape)} in the file, {list(expected[ours].shape)} in the detector)"
        for ours, (name, value) in renamed.items()
        if ours in expected and value.shape != expected[ours].shape
    ]
    faults = [("has unknown entries", unknown), ("lacks weights", missing), ("has other shapes", misshaped)]
    texts = [f"{what}: {_few(names)}" for what, names in faults if names]
    if texts:
        raise DataError(f"the file is not of this detector; it {'; it '.join(texts)}. Choose its configuration.")
    return {ours: value.detach().clone() for ours, (_, value) in renamed.items()}


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
