"""What goes into a run, a CLIP, and what comes out of it: averaged weights that open_clip and every tool load."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ovdet2.errors import DataError, UsageError
from ovdet2.files import write_safetensors
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher, needs_quick_gelu, state_dict_sha256

SCHEMA = "ovdet2/clim/1"
_POSITIONS = "visual.positional_embedding", "visual.attnpool.positional_embedding"


def load_clip(architecture, pretrained, device="cpu"):
    """:meth:`Teacher.load` with a closer look at a safetensors file.

    Raises:
        DataError: the file is of another architecture, or of another resolution: open_clip would interpolate its
            positional embedding without a word.
        UsageError, DataError: see :meth:`Teacher.load`.
    """
    path = Path(pretrained)
    if not path.is_file() or path.suffix != ".safetensors":
        return Teacher.load(architecture, str(pretrained), device)
    shapes, stated = _look_at(path)
    if stated not in (None, architecture):
        raise DataError(
            f"{path} is not of the architecture {architecture}, it states {stated}: set MODEL.TEACHER.ARCHITECTURE."
        )
    try:
        teacher = Teacher.load(architecture, str(path), device)
    except DataError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise DataError(
            f"{path} is not of the architecture {architecture} ({reason} ...): set MODEL.TEACHER.ARCHITECTURE to that "
            "of the file."
        ) from None
    state = teacher.clip.state_dict()
    for name in _POSITIONS:
        if name in state and shapes[name] != list(state[name].shape):
            raise DataError(
                f"{path} is of another resolution than {architecture}: its positional embedding is {shapes[name]}, "
                f"not {list(state[name].shape)}. Name the architecture of its image size."
            )
    return teacher


def file_architecture(architecture, pretrained):
    """The architecture that a file of these weights is loaded with.

    OpenAI's weights need QuickGELU, which a pretrained tag says and a file cannot: then "<architecture>-quickgelu".

    Raises:
        UsageError: open_clip has no such architecture.
    """
    import open_clip

    if not needs_quick_gelu(architecture, pretrained):
        return architecture
    name = architecture if architecture.endswith("-quickgelu") else f"{architecture}-quickgelu"
    if name not in open_clip.list_models():
        raise UsageError(f"{architecture} / {pretrained} needs QuickGELU, and open_clip has no {name} for its file.")
    return name


def averaged(trained, original, weight):
    """``weight * trained + (1 - weight) * original``, parameter by parameter.

    Args:
        trained, original: dicts of name to Tensor, with the same names and shapes.
        weight: a in [0, 1].

    Returns:
        dict of name to Tensor; integer tensors are those of ``trained``.

    Raises:
        UsageError: the weight is outside [0, 1].
        DataError: names or shapes differ.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"CLIM.AVERAGE is {weight}: give the share of the trained weights, 0 to 1.")
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (trained, original)]
    if shapes[0] != shapes[1]:
        name = next(name for name, _ in set(shapes[0].items()) ^ set(shapes[1].items()))
        raise DataError(
            f"the trained weights are not of the original's architecture, {name} differs: "
            f"{shapes[0].get(name)} and {shapes[1].get(name)}."
        )
    return {
        name: weight * tensor + (1 - weight) * original[name].to(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in trained.items()
    }


def export(path, clip, original, weight, facts):
    """Write the averaged weights of a run as a safetensors file that is a teacher of its own.

    ``MODEL.TEACHER.PRETRAINED <path>`` and ``--pretrained <path>`` take it, with the architecture it states.

    Args:
        path: file to write.
        clip: the trained open_clip model.
        original: :class:`~ovdet2.vlm.teacher.Teacher` it started from.
        weight: of :func:`averaged`.
        facts: further entries of the manifest.

    Returns:
        :class:`Fingerprint` of the file.
    """
    trained = {name: tensor.detach().cpu() for name, tensor in clip.state_dict().items()}
    state = averaged(trained, {name: tensor.cpu() for name, tensor in original.clip.state_dict().items()}, weight)
    source = original.fingerprint
    architecture = file_architecture(source.architecture, source.pretrained)
    fingerprint = Fingerprint(architecture, Path(path).name, state_dict_sha256(state))
    manifest = {
        "schema": SCHEMA,
        "fingerprint": fingerprint.to_dict(),
        "original": source.to_dict(),
        "average": weight,
        **facts,
    }
    write_safetensors(path, state, manifest)
    return fingerprint


def _look_at(path):
    """(name -> shape, the architecture it states or None) of a safetensors file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
            manifest = json.loads((file.metadata() or {}).get("manifest", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise DataError(f"{path} is no whole safetensors file ({error}): download or write it again.") from None
    return shapes, manifest.get("fingerprint", {}).get("architecture")
