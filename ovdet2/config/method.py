"""The interface of a method to the toolkit: configuration keys, checks, sample steps, model part, report entries.

A method is a directory whose ``__init__`` defines ``METHOD``, an instance of a subclass of :class:`Method`. It is in
``ovdet2/methods``, or MODEL.PARTS holds its import path, or an installed package declares it as an entry point of the
group "ovdet2.parts". Importing it must be fast: modules that need torch or Detectron2's models are imported within the
functions.
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
    """Base class of methods. By default nothing is added; override the functions that the method needs.

    Attributes:
        name: of the method and of its part in the detector, a Python identifier such as "vild": the prefix of its
            weights in a checkpoint.
        hosts: meta-architectures that support it; empty: all.
        training_only: its part is not used at test: a checkpoint may hold the part's weights and the model not, or the
            reverse.
        secondary_scores: values of MODEL.OVD.SECONDARY_SCORES that it provides.
        scores_background: whether its secondary scores have a column for background.
        reads_background: if switched on, it needs the teacher's embedding of the word "background" in the word bank.
        OLD_KEYS: {key of an earlier version: current key}; old keys are accepted with a warning.
        OLD_WEIGHTS: {prefix of entries in checkpoints of an earlier version: current prefix}.
    """

    name: str = ""
    hosts: tuple[str, ...] = ()
    secondary_scores: tuple[str, ...] = ()
    scores_background: bool = False
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
        """Refuse contradictory settings of the method. Called for every configuration, also if the method is off.

        Raises:
            UsageError: the settings are contradictory; the message names the keys.
        """

    def trains_words(self, cfg: CfgNode) -> bool:
        """Whether a loss of the method trains classification, so that the classification loss may have weight 0."""
        return False

    def names_novel_classes(self, cfg: CfgNode) -> bool:
        """Whether training uses names of novel classes, such as in a list of image tags; for the report."""
        return False

    def for_evaluation(self, cfg: CfgNode) -> None:
        """Switch off, in a copy of a configuration, what only training uses, so that its files are not needed."""

    def steps(self, cfg: CfgNode, source: SourceSpec, is_train: bool) -> list[Step]:
        """Steps that are applied to each sample of ``source`` after augmentation and instances.

        They must draw random numbers from numpy's global generator, which the loader seeds for each sample.

        Raises:
            UsageError, CacheError: a file that they need is not configured, missing, or of another data set or teacher.
        """
        return []

    def sources(self, cfg: CfgNode) -> list[SourceSpec]:
        """Sources of training images that the method adds to DATASETS.TRAIN and DATASETS.SOURCES."""
        return []

    def register(self) -> None:
        """Import the modules that add to Detectron2's registries; called before a detector that uses the method is
        built."""

    def build(self, cfg: CfgNode, host: Host) -> Part | None:
        """Build the method's part of the detector; None if the method is off.

        For the interfaces see :class:`~ovdet2.modeling.rcnn.part.RCNNPart` and
        :class:`~ovdet2.modeling.detr.part.DetrPart`.
        """
        return None

    def facts(self, cfg: CfgNode) -> dict[str, Any]:
        """JSON-serialisable entries of the method in a report, in addition to the configuration."""
        return {}
