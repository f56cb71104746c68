"""What a method adds to a detector: the interface common to all hosts.

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
    """Base class of the modules that methods add to a detector (host); it does nothing.

    Losses are returned unweighted, under names that begin with "loss_"; ``loss_weights`` holds their weights by kind.

    Attributes:
        name: name of the method, the prefix of the part's weights in a checkpoint.
        old_weights: {prefix in checkpoints of an earlier version: present prefix}, the method's OLD_WEIGHTS.
        training_only: it is not used at test; its weights may be missing in a checkpoint or in the model.
        takes_present_words: whether it takes the words present in an image (semantic priors). Detections then have
            ``prior_words``, int64: the prior word of each detection (an index into the vocabulary, -1 for none).
        sees: kinds of images without boxes that it has losses for, among ``CAPTIONS`` and ``IMAGE_LABELS``.
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
        """Prepare what the losses need from the training sets; called once, before the first step.

        Args:
            sources: training sources, each with ``records``, ``steps`` and ``seed``.

        Raises:
            UsageError, CacheError: required data is missing.
        """

    def predict_present_words(self, image: np.ndarray, teacher: Callable[[], Teacher]) -> list[str]:
        """Predict which words of the detector's vocabulary are present in an image, best first.

        For parts with ``takes_present_words``.

        Args:
            image: array [H, W, 3] uint8 RGB.
            teacher: function that loads MODEL.TEACHER.
        """
        raise NotImplementedError

    def give_present_words(self, sample: Sample, words: Sequence[str]) -> None:
        """Attach the given present words of an image to its sample; for parts with ``takes_present_words``.

        Raises:
            UsageError: a word is not in the vocabulary, or is given twice.
        """
        raise NotImplementedError


AnyPart = TypeVar("AnyPart", bound=Part)


def build_parts(cfg: CfgNode, methods: Iterable[Method], host: Host) -> list[Part]:
    """Build the parts of a configuration for a host, in the order of the methods."""
    built = []
    for method in methods:
        part = method.build(cfg, host)
        if part is not None:
            part.name = method.name
            part.old_weights = method.OLD_WEIGHTS
            part.training_only = part.training_only or method.training_only
            built.append(part)
    return built


def register_parts(model: nn.Module, parts: Iterable[AnyPart], kind: type[Part] | None = None) -> tuple[AnyPart, ...]:
    """Register each part as a submodule of the model under its name; returns the parts in their order.

    Args:
        model: the host.
        parts: its parts.
        kind: class that the host requires of its parts.

    Raises:
        UsageError: a part is not of the class, has no name, or has a name that the model already uses.
    """
    registered = tuple(parts)
    for part in registered:
        if kind is not None and not isinstance(part, kind):
            raise UsageError(
                f"{type(model).__name__} takes parts of class {kind.__name__}; that of the method {part.name} is a "
                f"{type(part).__name__}: build another for this host, or name the method's hosts."
            )
        if not part.name.isidentifier() or part.name == "parts" or hasattr(model, part.name):
            raise UsageError(
                f"{type(model).__name__} cannot have a part named {part.name!r}: give its method a name that is a "
                "Python identifier and is not used by the detector or by another method."
            )
        model.add_module(part.name, part)
    return registered


def parts_of(model: nn.Module) -> tuple[Part, ...]:
    """The parts of a detector; empty for a model without parts."""
    return cast("tuple[Part, ...]", getattr(model, "parts", ()))


def prepare_training(model: nn.Module, sources: Sequence[TrainSource]) -> None:
    """Call :meth:`Part.prepare_training` of all parts of a detector; once, before the first step.

    Raises:
        UsageError, CacheError: see :func:`require_seen` and :meth:`Part.prepare_training`.
    """
    if hasattr(model, "parts"):  # other models have no such restriction
        require_seen(parts_of(model), [source.spec.kind for source in sources])
    for part in parts_of(model):
        part.prepare_training(sources)


def require_seen(parts: Iterable[Part], kinds: Iterable[str]) -> None:
    """Refuse kinds of images for which no part has a loss.

    Args:
        parts: parts of a detector.
        kinds: kinds of the images of a source or a batch; the detector itself has losses for images with boxes.

    Raises:
        UsageError: no part has losses for a kind.
    """
    seen = {BOXES, *(kind for part in parts for kind in part.sees)}
    unseen = sorted(set(kinds) - seen)
    if unseen:
        raise UsageError(
            f"no part of the detector has a loss for images of kind {', '.join(unseen)}: switch on a method that has "
            "one, or remove these images from DATASETS.SOURCES."
        )


def weighted(losses: Mapping[str, Tensor], part: Part, kind: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Losses of a part times their weights.

    Args:
        losses: losses by name.
        part: part with the ``loss_weights``.
        kind: function from the name of a loss to its key in ``loss_weights``, for example without the layer number.

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
    """Merge groups of losses into one dict, in their order.

    Raises:
        UsageError: two losses have the same name, so that one would replace the other.
    """
    losses: dict[str, Tensor] = {}
    for group in groups:
        twice = sorted(losses.keys() & group.keys())
        if twice:
            raise UsageError(f"a training step has two losses named {', '.join(twice)}: rename one of them.")
        losses.update(group)
    return losses
