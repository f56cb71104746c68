"""Read external embedding tables from numpy and torch files without running code from a pickle."""

from pathlib import Path

import numpy as np
import torch

from ovdet2.errors import DataError
from ovdet2.io.weights import load_torch


def read_table(path: str | Path, key: str | None = None) -> np.ndarray:
    """A matrix from a ``.npy`` file (``allow_pickle=False``), or a ``.pt`` or ``.pth`` file (``weights_only=True``).

    Args:
        path: the file. A torch file holds a tensor, or a dict of tensors.
        key: entry of the dict; required if it has several tensors.

    Returns:
        array [K, D] float32; rows are not normalised.

    Raises:
        DataError: another kind of file, a damaged file, a file that could run code, no such entry, or not a matrix of
            floating-point numbers.
    """
    path = Path(path)
    if path.suffix == ".npy":
        if key is not None:
            raise DataError(f"{path} holds one table: remove --key.")
        table = _read_numpy(path)
    elif path.suffix in (".pt", ".pth"):
        table = _pick(_read_torch(path), key, path)
    else:
        raise DataError(f"{path} is neither .npy nor .pt nor .pth: save the table as one of them.")
    if table.ndim != 2 or 0 in table.shape:
        raise DataError(f"{path} has shape {list(table.shape)}: a table has a row per word, [K, D].")
    if not np.issubdtype(table.dtype, np.floating):
        raise DataError(f"{path} holds {table.dtype}, not floating-point numbers: it is no table of embeddings.")
    return table.astype(np.float32)


def _read_numpy(path):
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a complete .npy table ({error}): export it again with numpy.save.") from None
    return table


def _read_torch(path):
    try:
        return load_torch(path)
    except DataError as error:
        raise DataError(
            f"{path} is not a complete torch file with tensors only ({error}): export it again with torch.save of a "
            "tensor, or a dict of tensors."
        ) from None


def _pick(content, key, path):
    if isinstance(content, dict):
        tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
        if key is None and len(tensors) != 1:
            raise DataError(f"{path} has the tensors {_listed(tensors)}: choose one with --key.")
        key = next(iter(tensors)) if key is None else key
        if key not in tensors:
            raise DataError(f"{path} has no tensor {key!r}; it has {_listed(tensors)}: set --key to one of them.")
        content = tensors[key]
    elif key is not None:
        raise DataError(f"{path} holds no dict of tensors: remove --key.")
    if not isinstance(content, torch.Tensor):
        raise DataError(f"{path} holds a {type(content).__name__}, not a tensor: export it again with torch.save.")
    dense = content.detach().to_dense()
    return (dense.float() if dense.is_floating_point() else dense).numpy()


def _listed(tensors):
    shapes = [f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:8]]
    return ", ".join(shapes + (["..."] if len(tensors) > 8 else [])) or "none"
