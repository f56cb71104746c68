"""Read weight files (torch, safetensors, pickles of Detectron2's model zoo) without running code from them."""

import argparse
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ovdet2.errors import DataError
from ovdet2.io.array_pickle import DamagedPickle, read_array_pickle

# Where training programs put the weights.
_WEIGHTS = ("model", "state_dict", "model_state_dict", "module")
_SHOWN = 3  # names in a message
_DEEPEST = 4  # dicts within dicts; a hostile file may hold a dict that holds itself
# What torch.load raises for a damaged file: its unpickler does not check what a pickle does to its stack.
_OF_DAMAGE = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError,
    MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class DamagedFile(DataError):
    """A file that is truncated, not of the format of its suffix, or of values that are not finite.

    It differs from a missing file: an older file may be read in its place.
    """


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or weight file.

    Args:
        path: ".safetensors", ".pkl" (Detectron2's zoo: numpy arrays in a dict), or a torch file.

    Returns:
        dict with the key "model" (name to tensor or array, see :func:`unwrapped`) and the other entries of the file.

    Raises:
        DataError: the file is missing, holds no weights, could run code, is damaged, or holds values that are not
            finite (both :class:`DamagedFile`).
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a weight file: set MODEL.WEIGHTS to a file in it.")
    if not path.is_file():
        raise DataError(f"the weight file {path} does not exist: check MODEL.WEIGHTS.")
    readers = {".safetensors": _read_safetensors, ".pkl": _read_zoo_pickle}
    data = unwrapped(readers.get(path.suffix, _read_torch)(path))
    if not any(isinstance(value, (torch.Tensor, np.ndarray)) for value in data["model"].values()):
        held = ", ".join(map(repr, list(data["model"])[:_SHOWN])) or "nothing"
        raise DataError(f"{path} holds no weights, only {held}: save the state dict of the model.")
    require_finite(data["model"], path)
    return data


def read_entries(path: str | Path, part: str) -> dict[str, Any]:
    """The weights of a file whose names contain ``part``; of a .safetensors file, the others are not read.

    Raises:
        DataError: as :func:`read_weights`; a .safetensors file may hold no such entries.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        return {name: value for name, value in read_weights(path)["model"].items() if part in name}
    entries = unwrapped(_read_safetensors(path, part))["model"]
    require_finite(entries, path)
    return entries


def unwrapped(data: Mapping[Any, Any]) -> dict[str, Any]:
    """The weights of a checkpoint under the model's own names, whichever program saved it.

    The weights are the dict under "model", "state_dict", "model_state_dict" or "module", or the file itself. Prefixes of
    wrappers are removed: "module." (DistributedDataParallel) if all names have it, "_orig_mod." (torch.compile) in any
    place, and of a file of Lightning the name of its attribute that holds the model.

    Args:
        data: content of a file.

    Returns:
        dict with the key "model" (name to tensor or array) and the other entries of the file.
    """
    weights, others, depth = {str(name): value for name, value in data.items()}, {}, 0
    while depth < _DEEPEST and (key := next((key for key in _WEIGHTS if isinstance(weights.get(key), Mapping)), None)):
        inner = {str(name): value for name, value in weights.pop(key).items()}
        weights, others, depth = inner, weights | others, depth + 1
    before = None
    while before != list(weights):  # wrappers may be nested
        before = list(weights)
        weights = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
        weights = _without_prefix(weights, "module.")
    if "pytorch-lightning_version" in others:
        weights = _without_attribute(weights)
    return others | {"model": weights}


def _without_prefix(weights, prefix):
    if not weights or not all(name.startswith(prefix) for name in weights):
        return weights
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _without_attribute(weights):
    """Remove the attribute of a LightningModule that holds most of the tensors; what losses hold keeps its name."""
    names = [name.split(".", 1)[0] for name in weights]
    most = max(set(names), key=names.count, default="")
    if 2 * names.count(most) <= len(names) or not any(name.count(".") > 1 for name in weights):
        return weights
    return {name.removeprefix(f"{most}."): value for name, value in weights.items()}


def require_finite(weights: Mapping[str, Any], path: str | Path) -> None:
    """Refuse weights with values that are not finite; a mask of attention may hold infinities.

    Args:
        weights: name to tensor or array.
        path: of their file, for the message.

    Raises:
        DamagedFile: the message names the first of them.
    """
    faulty = [name for name, value in weights.items() if not _is_finite(name, value)]
    if faulty:
        shown = ", ".join(faulty[:_SHOWN]) + (", ..." if len(faulty) > _SHOWN else "")
        raise DamagedFile(
            f"{path}: {len(faulty)} of its {len(weights)} weights hold values that are not finite ({shown}): the training "
            "that wrote it diverged, or it is damaged; use an earlier checkpoint."
        )


def _is_finite(name, value):
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.as_tensor(value.astype(np.float32) if value.dtype.byteorder == ">" else value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or "mask" in name:
        return True
    return bool(value.isfinite().all())


def known_kind(names: Iterable[str]) -> str | None:
    """What the names of the weights show a file to be, for messages; None if they are not known.

    Args:
        names: of the weights, see :func:`unwrapped`.
    """
    starts = {name.split(".", 1)[0] for name in names}
    if {"vision_model", "text_model"} <= starts:
        return "a CLIP with the names of transformers (CLIPModel, SiglipModel)"
    if "vision_model" in starts:
        return "only the image tower of a CLIP, with the names of transformers (CLIPVisionModel)"
    if (
        {"class_embedding", "ln_pre"} <= starts or {"patch_embed", "blocks"} <= starts
    ) and "token_embedding" not in starts:
        return "only an image tower, without the texts of a CLIP"
    if "visual" in starts:
        texts = starts & {"text", "token_embedding", "transformer"}
        return "a CLIP with the names of open_clip" if texts else "only the image tower of a CLIP, without its texts"
    if {"roi_heads", "proposal_generator"} & starts:
        return "a two-stage detector of Detectron2"
    if {"layer1", "layer4", "conv1"} <= starts:
        return "only a ResNet with the names of torchvision"
    return None


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
        raise DamagedFile(f"{path} is damaged or truncated ({without_advice(error)}){look(path)}: {_REMEDY}") from None
    if damaged:
        raise DamagedFile(f"{path} is damaged ({damaged} has another checksum): {_REMEDY}")


def load_torch(path: Path) -> Any:
    """The content of a torch file: tensors, plain values and containers, whatever their arrangement.

    Raises:
        DataError: the file could run code, or is a TorchScript program.
        DamagedFile: it is damaged or no torch file.
    """
    if path.is_file() and not (zipfile.is_zipfile(path) or _starts_like_a_pickle(path)):
        raise DamagedFile(f"{path} is no torch file or is truncated{look(path)}: {_REMEDY}")
    try:
        # Published checkpoints hold their training options as argparse.Namespace, which runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors and plain values ({without_advice(error)}) and was not opened, since it "
            "could run code: save only its state dict, best as .safetensors."
        ) from None
    except _OF_DAMAGE as error:
        if "TorchScript" in str(error):
            raise DataError(
                f"{path} is a TorchScript program and no weight file: save the state dict of its model."
            ) from None
        raise DamagedFile(f"{path} is damaged or truncated ({without_advice(error)}){look(path)}: {_REMEDY}") from None


def look(path: str | Path) -> str:
    """ ", it holds ..." for a file that is no weight file at all, by its first bytes; otherwise "". For messages."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(64).lstrip().lower()
    except (OSError, ValueError):  # ValueError: a name with a null byte
        return ""  # the caller names this error
    if not head:
        return ", it is empty"
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return ", it holds HTML or XML, perhaps the error page of a download"
    if head.startswith(b"version https://git-lfs"):
        return ", it holds the pointer of git-lfs and not the file: run git lfs pull"
    return ""


def without_advice(error: BaseException) -> str:
    """The reason of an error of torch.load in one line, without its advice to load the file in an unsafe way."""
    text = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return f"it names {named[1]}"
    if re.search(r"weights_only|safe_globals|trust", text):
        return "torch refuses it"
    return text[:300] or type(error).__name__


def _read_torch(path):
    data = load_torch(path)
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}, not a dict of weights: {_REMEDY}")
    return data


def _read_safetensors(path, part=""):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names, metadata = [name for name in file.keys() if part in name], file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, OSError) as error:
        raise DamagedFile(f"{path} is not a complete safetensors file ({error}){look(path)}: {_REMEDY}") from None
    if metadata.get("matching_heuristics") == "true":  # backbone weights: Detectron2 matches their names to the model
        return {"model": weights, "matching_heuristics": True}
    return weights


def _read_zoo_pickle(path):
    """Read a file of Detectron2's model zoo, or of Caffe2, whose names Detectron2 matches by heuristics."""
    try:
        data = read_array_pickle(path)
    except DamagedPickle as error:
        raise DamagedFile(f"{str(error).rstrip('.')}{look(path)}.") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}, not a dict of weights: {_REMEDY}")
    if "model" in data and "__author__" in data:
        return data
    weights = data.get("blobs", data)
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise DataError(f"{path} holds no dict of weights by name: {_REMEDY}")
    weights = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _starts_like_a_pickle(path):
    """Whether a file is a bare pickle of protocol 2 to 5, as torch before 1.6 wrote."""
    with open(path, "rb") as handle:
        head = handle.read(2)
    return len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


_REMEDY = "download or save it again."
