"""The fingerprint of a teacher, which identifies its embedding space.

Embeddings of two CLIP models can have the same dimension, but they are not comparable: a training with both would run
and learn nothing. Therefore every artefact with embeddings holds the fingerprint of its teacher, and every reader
compares it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError
from ovdet2.io.manifests import fault_of
from ovdet2.vlm.weight_files import file_architecture

_FORM = {"architecture": str, "pretrained": str, "weights_sha256": (str, None)}


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a teacher's weights.

    Attributes:
        architecture: open_clip architecture name, such as "ViT-B-32".
        pretrained: pretrained tag ("openai"), "embedded", or the name of a local weight file.
        weights_sha256: hash of the loaded weights; None if the weights are not loaded, as for an imported table.
    """

    architecture: str
    pretrained: str
    weights_sha256: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Plain dict for a manifest."""
        return asdict(self)

    @classmethod
    def stated(cls, architecture: str, pretrained: str) -> "Fingerprint":
        """A fingerprint by name only, for tables and configurations whose weights are not loaded.

        A path to a weight file is reduced to its file name, as :meth:`Teacher.load` records it.
        """
        return cls(architecture, Path(pretrained).name, None)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "Fingerprint":
        """Read a manifest entry. Raises :class:`DataError` that names ``source`` if a field is missing or no text."""
        if fault_of(values, _FORM):
            raise DataError(f"{source} has no teacher fingerprint: rebuild it with this version of ovdet2.")
        return cls(values["architecture"], values["pretrained"], values["weights_sha256"])

    def __str__(self):
        digest = self.weights_sha256[:12] if self.weights_sha256 else "weights not hashed"
        return f"{self.architecture} / {self.pretrained} ({digest})"


def require_same_teacher(first: Fingerprint, first_name: str, second: Fingerprint, second_name: str) -> None:
    """Raise unless two fingerprints are of the same embedding space.

    If both hashes are known, hash and architecture must match. If one is unknown (an imported table, or a configuration
    whose weights are not loaded), architecture and pretrained tag must match. "RN50" with the tag "openai" and
    "RN50-quickgelu" count as the same architecture, but "RN50" with a file of these weights does not: see
    :func:`~ovdet2.vlm.weight_files.file_architecture`.

    Args:
        first, second: :class:`Fingerprint`.
        first_name, second_name: their owners, for the message ("the vocabulary file x.safetensors").

    Raises:
        DataError: they differ; the message names both.
    """
    hashed = bool(first.weights_sha256 and second.weights_sha256)
    same = first.weights_sha256 == second.weights_sha256 if hashed else first.pretrained == second.pretrained
    architectures = [file_architecture(teacher.architecture, teacher.pretrained) for teacher in (first, second)]
    if not same or architectures[0] != architectures[1]:
        remedy = "Embeddings of two teachers cannot be compared: rebuild one of them, or set MODEL.TEACHER to match."
        if hashed and same and len({name.removesuffix("-quickgelu") for name in architectures}) == 1:
            remedy = (
                "The weights are the same, but their activation function is not: weights of a file use the activation "
                f"of the given architecture, and OpenAI's weights need {max(architectures)}."
            )
        raise DataError(f"{first_name} is of teacher {first}, but {second_name} is of teacher {second}. {remedy}")
