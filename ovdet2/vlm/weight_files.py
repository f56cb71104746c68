"""Checks of a teacher's weight file that open_clip does not make: architecture, activation and resolution.

open_clip silently interpolates a positional embedding of another resolution. Only files that ovdet2 wrote state the
activation function of their weights.
"""

import contextlib
import json
import tempfile
from collections.abc import Generator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ovdet2.errors import DataError
from ovdet2.io.files import write_safetensors
from ovdet2.io.weights import known_kind, load_torch, read_weights

_POSITIONS = "visual.positional_embedding"  # of a ViT; a ResNet's attention pool of another size cannot be loaded


def needs_quick_gelu(architecture: str, pretrained: str) -> bool:
    """Whether a pretrained tag was trained with QuickGELU, as OpenAI's weights were; their names do not state it.

    With the other activation all embeddings are slightly wrong, without an error. For a weight file the name of the
    architecture decides ("ViT-B-32-quickgelu").
    """
    import open_clip

    return bool((open_clip.get_pretrained_cfg(architecture, pretrained) or {}).get("quick_gelu", False))


def file_architecture(architecture: str, pretrained: str) -> str:
    """The architecture name that gives a file of these weights the right activation function.

    It is "<architecture>-quickgelu" if the pretrained tag needs QuickGELU and the name does not end with it.
    """
    named = architecture.endswith("-quickgelu")
    return architecture if named or not needs_quick_gelu(architecture, pretrained) else f"{architecture}-quickgelu"


def check_stated_architecture(path: Path, architecture: str) -> None:
    """Compare the architecture that a file states, if any, with the requested one.

    Args:
        path: :class:`~pathlib.Path` of the file.
        architecture: open_clip name.

    Raises:
        DataError: another architecture, such as "ViT-B-16" for "ViT-B-16-quickgelu"; or a truncated safetensors file.
    """
    if path.suffix != ".safetensors":
        return
    metadata = _read(path, lambda file: file.metadata() or {})
    try:
        stated = json.loads(metadata["manifest"])["fingerprint"]["architecture"]
    except (KeyError, TypeError, ValueError):  # a file that ovdet2 did not write
        return
    if stated != architecture:
        raise DataError(
            f"{path} is of the architecture {stated}, not {architecture}: set MODEL.TEACHER.ARCHITECTURE, or "
            f"--architecture, to {stated}."
        )


@contextlib.contextmanager
def readable_by_open_clip(path: Path, architecture: str) -> Generator[Path, None, None]:
    """Yield a file with the weights of a teacher under the names that open_clip reads.

    It is the file itself, or a temporary one if open_clip does not know the arrangement of the file
    (:func:`~ovdet2.io.weights.unwrapped`). Big Vision's ``.npz`` files and TorchScript archives are not changed.

    Raises:
        DataError: the file cannot be read, or its names show that it is no CLIP of open_clip.
    """
    if path.suffix in (".npz", ".npy") or is_torchscript(path):
        yield path
        return
    weights = {name: torch.as_tensor(value) for name, value in read_weights(path)["model"].items()}
    kind = known_kind(weights)
    if kind is not None and kind != known_kind(["visual.", "text."]):
        raise DataError(
            f"{path} is {kind}, and no CLIP with the names of open_clip, of which {architecture} is one: give the weights "
            "that open_clip publishes for it (a pretrained tag downloads them)."
        )
    if list(weights) == _names_for_open_clip(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ovdet2-") as folder:
        plain = Path(folder) / "weights.safetensors"
        write_safetensors(plain, weights, {"schema": "ovdet2/unwrapped/1"})
        yield plain


def check_resolution(path: Path, architecture: str, state: Mapping[str, torch.Tensor]) -> None:
    """Compare the positional embedding of a file with that of the model into which it was loaded.

    Args:
        path: :class:`~pathlib.Path` of the file. A file that names the positional embedding differently is not checked.
        architecture: open_clip name.
        state: the model's state dict.

    Raises:
        DataError: the file is of another resolution.
    """
    if _POSITIONS not in state:
        return
    in_file, in_model = _shapes(path).get(_POSITIONS), list(state[_POSITIONS].shape)
    if in_file not in (None, in_model):
        raise DataError(
            f"{path} is of another resolution than {architecture}: its positional embedding is {in_file}, not "
            f"{in_model}. Choose the architecture of its image size."
        )


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI publishes its models.

    torch reads such a file without unpickling python objects, but not with ``weights_only=True``. The check is the one
    of torch.load, because ``weights_only=False`` would run the code in any other file.
    """
    try:
        return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # no archive of torch
        return False


def _names_for_open_clip(path):
    """The names of the weights as open_clip reads the file."""
    if path.suffix == ".safetensors":
        names = _read(path, lambda file: list(file.keys()))
    elif path.suffix == ".pkl":
        return []  # arrays, which it does not read
    else:
        content = load_torch(path)
        names = list(content.get("state_dict", content))
    first = str(next(iter(names), ""))
    return [str(name)[7:] for name in names] if first.startswith("module") else names


def _shapes(path):
    """{name of a tensor: its shape as a list}, empty for formats that open_clip converts."""
    if path.suffix in (".npz", ".npy"):
        return {}
    if is_torchscript(path):
        return {name: list(tensor.shape) for name, tensor in torch.jit.load(path, "cpu").state_dict().items()}
    if path.suffix == ".safetensors":
        return _read(path, lambda file: {name: file.get_slice(name).get_shape() for name in file.keys()})
    return {name: list(torch.as_tensor(value).shape) for name, value in read_weights(path)["model"].items()}


def _read(path, look):
    try:
        with safe_open(str(path), framework="pt") as file:
            return look(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is no complete safetensors file ({error}): download or write it again.") from None
