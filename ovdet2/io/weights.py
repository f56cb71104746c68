"""Read weight files (torch, safetensors, pickles of Detectron2's model zoo) without running code from them."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ovdet2.errors import DataError
from ovdet2.io.array_pickle import DamagedPickle, read_array_pickle


class DamagedFile(DataError):
    """A file that is truncated or not of the format of its suffix, as opposed to a missing file."""


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or weight file.

    Args:
        path: ".safetensors", ".pkl" (Detectron2's zoo: numpy arrays in a dict), or a torch file.

    Returns:
        dict with the key "model" (name to tensor or array) and the other entries of the file.

    Raises:
        DataError: the file is missing, damaged (:class:`DamagedFile`), or could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"the weight file {path} does not exist: check MODEL.WEIGHTS.")
    readers = {".safetensors": _read_safetensors, ".pkl": _read_zoo_pickle}
    data = readers.get(path.suffix, _read_torch)(path)
    return data if "model" in data else {"model": data}


def verify_archive(path: str | Path) -> None:
    """Verify the checksums in a torch file, which torch.load does not; takes about a second for 1 GB.

    Use it for files that ovdet2 wrote; other files may have no checksums.

    Raises:
        DamagedFile: a byte differs, or the file is truncated.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise DamagedFile(f"{path} is damaged or truncated ({_first_line(error)}): {_REMEDY}") from None
    if damaged:
        raise DamagedFile(f"{path} is damaged ({damaged} has another checksum): {_REMEDY}")


def _read_torch(path):
    try:
        # Published checkpoints hold their training options as argparse.Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if path.stat().st_size == 0 or not (zipfile.is_zipfile(path) or _starts_like_a_pickle(path)):
            raise DamagedFile(f"{path} is no torch file or is truncated: {_REMEDY}") from None
        reason = _first_line(str(error).split("WeightsUnpickler error:")[-1].strip())
        raise DataError(
            f"{path} holds more than tensors and plain values ({reason}) and was not opened, since it could run code: "
            "save only its state dict, best as .safetensors."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DamagedFile(f"{path} is damaged or truncated ({_first_line(error)}): {_REMEDY}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}, not a dict of weights: {_REMEDY}")
    return data


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError, OSError) as error:
        raise DamagedFile(f"{path} is not a complete safetensors file ({error}): {_REMEDY}") from None
    if metadata.get("matching_heuristics") == "true":  # backbone weights: Detectron2 matches their names to the model
        return {"model": weights, "matching_heuristics": True}
    return weights


def _read_zoo_pickle(path):
    """Read a file of Detectron2's model zoo, or of Caffe2, whose names Detectron2 matches by heuristics."""
    try:
        data = read_array_pickle(path)
    except DamagedPickle as error:
        raise DamagedFile(str(error)) from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}, not a dict of weights: {_REMEDY}")
    if "model" in data and "__author__" in data:
        return data
    weights = data.get("blobs", data)
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise DataError(f"{path} holds no dict of weights by name: {_REMEDY}")
    weights = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _first_line(message):
    return (str(message).splitlines() or ["no reason given"])[0]


def _starts_like_a_pickle(path):
    """Whether a file is a bare pickle of protocol 2 to 5, as torch before 1.6 wrote."""
    with open(path, "rb") as handle:
        head = handle.read(2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


_REMEDY = "download or save it again."
