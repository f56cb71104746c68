"""What a method adds to a detector, whatever the host: the common part of the protocol.

The hosts extend it: :class:`~ovdet2.modeling.rcnn.part.RCNNPart`, :class:`~ovdet2.modeling.detr.part.DetrPart`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor, nn

from ovdet2.config.method import Method
from ovdet2.data.samples import Sample
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
        training_only: nothing of it is used at test; a checkpoint may have it and the model not, or the other way
            round.
        takes_present_words: whether it reads the words that are present in an image (semantic priors). Detections then
            have ``prior_words``, int64, the word that each was found with (an index into the vocabulary, -1 for none).
        sees: kinds of images without boxes that it has losses of, of ``CAPTIONS`` and ``IMAGE_LABELS``.
        loss_weights: weight of each kind of its losses; 1 where a kind is not named.
    """

    name: str = ""
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


def build_parts(cfg: CfgNode, methods: Iterable[Method], host: Host) -> list[Part]:
    """The parts of a configuration for a host, in the order of the methods."""
    built = []
    for method in methods:
        part = method.build(cfg, host)
        if part is not None:
            part.name = method.name
            part.training_only = part.training_only or method.training_only
            built.append(part)
    return built


def joined_losses(groups: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Losses of several owners in their order.

    Raises:
        UsageError: two have one name.
    """
    joined: dict[str, Tensor] = {}
    for losses in groups:
        twice = joined.keys() & losses.keys()
        if twice:
            raise UsageError(f"several losses are called {', '.join(sorted(twice))}: rename those of one part.")
        joined.update(losses)
    return joined


def weighted(losses: Mapping[str, Tensor], part: Part, kind: Callable[[str], str] = str) -> dict[str, Tensor]:
    """Losses of a part times their weights.

    Args:
        losses: by name.
        part: whose ``loss_weights`` apply.
        kind: function of a name that gives its key there, such as one that takes a layer's number off.
    """
    return {name: part.loss_weights.get(kind(name), 1.0) * value for name, value in losses.items()}
