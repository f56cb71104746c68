"""What a teacher's weight file says of itself, which open_clip does not ask.

open_clip interpolates a positional embedding of another resolution without a word, and no file says which activation
its weights were trained with, but for those that ovdet2 writes.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ovdet2.errors import DataError

_POSITIONS = "visual.positional_embedding"  # of a ViT; a ResNet's attention pool of another size cannot be loaded


def needs_quick_gelu(architecture: str, pretrained: str) -> bool:
    """Whether a pretrained tag was trained with QuickGELU: OpenAI's weights were, under names that do not say so.

    With the other activation every embedding is a little off, and nothing fails. For a weight file the name of the
    architecture decides ("ViT-B-32-quickgelu").
    """
    import open_clip

    return bool((open_clip.get_pretrained_cfg(architecture, pretrained) or {}).get("quick_gelu", False))


def file_architecture(architecture: str, pretrained: str) -> str:
    """The architecture under which a file of these weights has their activation: "<architecture>-quickgelu" where the
    tag says so and the name does not."""
    said = architecture.endswith("-quickgelu")
    return architecture if said or not needs_quick_gelu(architecture, pretrained) else f"{architecture}-quickgelu"


def check_stated_architecture(path: Path, architecture: str) -> None:
    """Compare the architecture that a file states, if it does, with the one that is asked for.

    Args:
        path: :class:`~pathlib.Path` of the file.
        architecture: open_clip name.

    Raises:
        DataError: another architecture, such as "ViT-B-16" for "ViT-B-16-quickgelu"; or a torn safetensors file.
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
            f"{path} is not of the architecture {architecture}, it states {stated}: set MODEL.TEACHER.ARCHITECTURE, or "
            "--architecture, to that."
        )


def check_resolution(path: Path, architecture: str, state: Mapping[str, torch.Tensor]) -> None:
    """Compare the positional embedding of a file with that of the model it was loaded into.

    Args:
        path: :class:`~pathlib.Path` of the file. In third-party files that name it otherwise it is not looked for.
        architecture: open_clip name.
        state: the model's state dict.

    Raises:
        DataError: the file is of another resolution.
    """
    if _POSITIONS not in state:
        return
    found, wanted = _shapes(path).get(_POSITIONS), list(state[_POSITIONS].shape)
    if found not in (None, wanted):
        raise DataError(
            f"{path} is of another resolution than {architecture}: its positional embedding is {found}, not {wanted}. "
            "Name the architecture of its image size."
        )


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI publishes its models.

    torch reads such a file without unpickling python objects, but not as mere weights (``weights_only``). It is asked
    as torch itself does, for of any other file ``weights_only=False`` runs the code in it.
    """
    try:
        return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # no archive of torch
        return False


def _shapes(path):
    """{name of a tensor: its shape as a list}, empty for formats that open_clip converts."""
    if path.suffix in (".npz", ".npy"):
        return {}
    if path.suffix == ".safetensors":
        shapes = _read(path, lambda file: {name: file.get_slice(name).get_shape() for name in file.keys()})
    else:
        from open_clip.factory import load_state_dict

        state = load_state_dict(str(path), weights_only=not is_torchscript(path))
        shapes = {name: tensor.shape for name, tensor in state.items()}
    return {name.removeprefix("module."): list(shape) for name, shape in shapes.items()}


def _read(path, look):
    try:
        with safe_open(str(path), framework="pt") as file:
            return look(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is no whole safetensors file ({error}): download or write it again.") from None
