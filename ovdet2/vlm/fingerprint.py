"""Which embedding space a vector lives in.

Vectors of two CLIP models of equal dimension look alike and mean nothing to each other: training would run and
learn nothing. So every artefact that holds embeddings states its teacher, and readers compare before use.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError
from ovdet2.vlm.weight_files import file_architecture


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a teacher's weights.

    Attributes:
        architecture: open_clip architecture name, such as "ViT-B-32".
        pretrained: pretrained tag ("openai"), "embedded", or the name of a local weight file.
        weights_sha256: hash of the loaded weights; None when a user only states where an imported table came from.
    """

    architecture: str
    pretrained: str
    weights_sha256: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Plain dict for a manifest."""
        return asdict(self)

    @classmethod
    def stated(cls, architecture: str, pretrained: str) -> "Fingerprint":
        """A fingerprint by name alone, for tables and configurations whose weights are not loaded.

        A path to a weight file is reduced to its file name, as :meth:`Teacher.load` records it.
        """
        return cls(architecture, Path(pretrained).name, None)

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "Fingerprint":
        """Read a manifest entry. Raises :class:`DataError` naming ``source`` when a field is missing."""
        try:
            return cls(values["architecture"], values["pretrained"], values["weights_sha256"])
        except (KeyError, TypeError):
            raise DataError(
                f"{source} states no teacher fingerprint: rebuild it with this version of ovdet2."
            ) from None

    def __str__(self):
        digest = self.weights_sha256[:12] if self.weights_sha256 else "weights not hashed"
        return f"{self.architecture} / {self.pretrained} ({digest})"


def require_same_teacher(first: Fingerprint, first_name: str, second: Fingerprint, second_name: str) -> None:
    """Raise unless two fingerprints are of one embedding space.

    With both hashes known they decide, with the architecture. Where one is unknown (an imported table, or a
    configuration whose weights are not loaded), architecture and pretrained tag must match. "RN50" by the tag "openai"
    and "RN50-quickgelu" are one architecture, "RN50" by a file of the same weights is another: see
    :func:`~ovdet2.vlm.weight_files.file_architecture`.

    Args:
        first, second: :class:`Fingerprint`.
        first_name, second_name: what carries them, for the message ("the vocabulary file x.safetensors").

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
                "The weights are the same, their activation is not: a file gets the one of its architecture, and "
                f"OpenAI's weights need {max(architectures)}."
            )
        raise DataError(f"{first_name} is of teacher {first}, but {second_name} is of teacher {second}. {remedy}")
