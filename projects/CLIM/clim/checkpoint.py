"""What comes out of a run: averaged weights that open_clip and every tool load."""

from pathlib import Path

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import write_safetensors
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import state_dict_sha256
from ovdet2.vlm.weight_files import file_architecture

SCHEMA = "ovdet2/clim/1"


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
    """Write the averaged weights of a run as a safetensors file that can be used as a teacher.

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
