"""What a method adds to a detector, whatever the host: the common part of the protocol.

The hosts extend it: :class:`~ovdet2.modeling.rcnn.part.RCNNPart`, :class:`~ovdet2.modeling.detr.part.DetrPart`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from torch import Tensor, nn

from ovdet2.config.method import Method
from ovdet2.data.samples import BOXES, Sample
from ovdet2.errors import UsageError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from ovdet2.data.sources import TrainSource
    from ovdet2.modeling.host import Host
    from ovdet2.vlm.teacher import Teacher


class Part(nn.Module):
    """A module that a host holds in a list, under its name; the base does nothing.

    Losses are returned unweighted, by names that begin with "loss_"; ``loss_weights`` has their weights by kind.

    Attributes:
        name: of the method, the prefix of the part's weights in a checkpoint.
        old_weights: {prefix of entries in checkpoints of an earlier version: today's}, the method's OLD_WEIGHTS.
        training_only: nothing of it is used at test; a checkpoint may have it and the model not, or the other way
            round.
        takes_present_words: whether it reads the words that are present in an image (semantic priors). Detections then
            have ``prior_words``, int64, the word that each was found with (an index into the vocabulary, -1 for none).
        sees: kinds of images without boxes that it has losses of, of ``CAPTIONS`` and ``IMAGE_LABELS``.
        loss_weights: weight of each kind of its losses; empty: 1 for all.
    """

    name: str = ""
    old_weights: Mapping[str, str] = {}
    training_only: bool = False
    takes_present_words: bool = False
    sees: tuple[str, ...] = ()

    def __init__(self, loss_weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.loss_weights: dict[str, float] = dict(loss_weights or {})

    def prepare_training(self, sources: Sequence[TrainSource]) -> None:
        """Take what the losses need of the training sets, once, before the first step.

        Args:
            sources: with ``records``, ``steps`` and ``seed`` of each.

        Raises:
            UsageError, CacheError: what is needed is not there.
        """

    def predict_present_words(self, image: np.ndarray, teacher: Callable[[], Teacher]) -> list[str]:
        """The words present in an image, best first, of the detector's vocabulary; for ``takes_present_words``.

        Args:
            image: array [H, W, 3] uint8 RGB.
            teacher: loads MODEL.TEACHER.
        """
        raise NotImplementedError

    def give_present_words(self, sample: Sample, words: Sequence[str]) -> None:
        """Attach the words present in an image to its sample; for ``takes_present_words``.

        Raises:
            UsageError: a word is not in the vocabulary, or twice.
        """
        raise NotImplementedError


AnyPart = TypeVar("AnyPart", bound=Part)


def build_parts(cfg: CfgNode, methods: Iterable[Method], host: Host) -> list[Part]:
    """The parts of a configuration for a host, in the order of the methods."""
    built = []
    for method in methods:
        part = method.build(cfg, host)
        if part is not None:
            part.name = method.name
            part.old_weights = method.OLD_WEIGHTS
            part.training_only = part.training_only or method.training_only
            built.append(part)
    return built


def register_parts(model: nn.Module, parts: Iterable[AnyPart]) -> tuple[AnyPart, ...]:
    """Make each part a module of the model, under its name; returns them in their order.

    Raises:
        UsageError: a part has no name, or one that the model uses already.
    """
    registered = tuple(parts)
    for part in registered:
        if not part.name.isidentifier() or hasattr(model, part.name):
            raise UsageError(
                f"{type(model).__name__} cannot have a part named {part.name!r}: give its method a name that is a "
                "Python identifier and is not used by the detector or by another method."
            )
        model.add_module(part.name, part)
    return registered


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The parts of a detector; none of a model that takes none."""
    return cast("tuple[Part, ...]", getattr(model, "parts", ()))


def prepare_training(model: nn.Module, sources: Sequence[TrainSource]) -> None:
    """Let the parts of a detector take what their losses need of the training sets; call it once, before the first step.

    Raises:
        UsageError, CacheError: see :func:`require_seen` and :meth:`Part.prepare_training`.
    """
    if hasattr(model, "parts"):  # another model may train on whatever it likes
        require_seen(parts_of(model), [source.spec.kind for source in sources])
    for part in parts_of(model):
        part.prepare_training(sources)


def require_seen(parts: Iterable[Part], kinds: Iterable[str]) -> None:
    """Refuse images that would train nothing.

    Args:
        parts: of a detector.
        kinds: of the images of a source or a batch; images with boxes train the detector itself.

    Raises:
        UsageError: no part has losses of a kind.
    """
    seen = {BOXES, *(kind for part in parts for kind in part.sees)}
    unseen = sorted(set(kinds) - seen)
    if unseen:
        raise UsageError(
            f"no part of the detector has losses of images of kind {', '.join(unseen)}: switch a method on that has, "
            "or take these images out of DATASETS.SOURCES."
        )


def weighted(losses: Mapping[str, Tensor], part: Part, kind: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Losses of a part times their weights.

    Args:
        losses: by name.
        part: whose ``loss_weights`` apply.
        kind: function of a name that gives its key there, such as one that takes a layer's number off.

    Raises:
        UsageError: ``losses`` is no mapping, or has a name that does not begin with "loss_" or has no weight although
            the part has weights.
    """
    if not isinstance(losses, Mapping):
        raise UsageError(
            f"the part {part.name} gives losses of type {type(losses).__name__}: it must be a dict by name."
        )
    unknown = [
        name
        for name in losses
        if not name.startswith("loss_") or (part.loss_weights and kind(name) not in part.loss_weights)
    ]
    if unknown:
        raise UsageError(
            f"the part {part.name} gives losses named {', '.join(unknown)}, and weights of "
            f"{', '.join(part.loss_weights) or 'none'}: a name begins with loss_, and a part that has weights has one for "
            "each of its losses."
        )
    return {name: part.loss_weights.get(kind(name), 1.0) * value for name, value in losses.items()}


def joined(*groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All losses of a step, in their order.

    Raises:
        UsageError: two of them have one name, so that one would replace the other.
    """
    losses: dict[str, Tensor] = {}
    for group in groups:
        twice = sorted(losses.keys() & group.keys())
        if twice:
            raise UsageError(f"a training step has two losses named {', '.join(twice)}: rename that of one part.")
        losses.update(group)
    return losses
