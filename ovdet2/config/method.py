"""What a method tells the toolkit about itself: keys, checks, sample steps, model parts, facts.

A method is a directory whose ``__init__`` defines ``METHOD``, an instance of a subclass of :class:`Method`: one of
``ovdet2/methods``, one named by MODEL.PARTS (its import path), or one that an installed package announces as an entry
point of the group "ovdet2.parts". The import of such a directory must be light: what needs torch or Detectron2's models
is imported within the functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detectron2.config import CfgNode

if TYPE_CHECKING:
    from ovdet2.data.source_spec import SourceSpec
    from ovdet2.data.steps.step import Step
    from ovdet2.modeling.host import Host
    from ovdet2.modeling.part import Part


class Method:
    """The base adds nothing; override what the method has.

    Attributes:
        name: of the method and of its part in the detector, a Python identifier such as "vild": the prefix of its
            weights in a checkpoint.
        hosts: meta-architectures that it can be switched on for; empty: all.
        training_only: nothing of its part is used at test: a checkpoint may have the part and the model not, or the
            other way round.
        secondary_scores: values of MODEL.OVD.SECONDARY_SCORES that it provides.
        reads_background: when switched on, it needs the teacher's embedding of the word "background" in the word bank.
        OLD_KEYS: {key of an earlier version: today's}; they are accepted with a message.
        OLD_WEIGHTS: {prefix of entries in checkpoints of an earlier version: today's}.
    """

    name: str = ""
    hosts: tuple[str, ...] = ()
    secondary_scores: tuple[str, ...] = ()
    reads_background: bool = False
    training_only: bool = False
    OLD_KEYS: dict[str, str] = {}
    OLD_WEIGHTS: dict[str, str] = {}

    def add_keys(self, cfg: CfgNode) -> None:
        """Add the keys of the method, each with its default, to the defaults of ovdet2."""

    def is_on(self, cfg: CfgNode) -> bool:
        """Whether a configuration uses the method."""
        return False

    def check(self, cfg: CfgNode) -> None:
        """Refuse settings of the method that do not go together. Called for every configuration, used or not.

        Raises:
            UsageError: names the keys.
        """

    def trains_words(self, cfg: CfgNode) -> bool:
        """Whether a loss of the method teaches the detector what a region is called, so that the classification loss
        may have weight 0."""
        return False

    def for_evaluation(self, cfg: CfgNode) -> None:
        """Switch off, in a copy of a configuration, what training alone uses, so that its files are not needed."""

    def steps(self, cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
        """Steps in the making of a sample of ``source``, after the image is augmented and has its instances. They draw
        random numbers from numpy's global generator, which the loader seeds for each sample.

        Raises:
            UsageError, CacheError: a file that they need is not named, missing, or of something else.
        """
        return []

    def sources(self, cfg: CfgNode) -> list[SourceSpec]:
        """Sources of training images beside DATASETS.TRAIN and DATASETS.SOURCES."""
        return []

    def build(self, cfg: CfgNode, host: Host) -> Part | None:
        """The model part, or None where the method is off. See the protocols of the hosts:
        :class:`~ovdet2.modeling.rcnn.part.RCNNPart` and :class:`~ovdet2.modeling.detr.part.DetrPart`."""
        return None

    def facts(self, cfg: CfgNode) -> dict[str, Any]:
        """What a report says of the method beside the configuration, ready for json."""
        return {}
