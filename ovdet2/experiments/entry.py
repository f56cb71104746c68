"""The description of an experiment: entries, the artefacts they read, the columns of the table. Nothing is run here."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode


@dataclass(frozen=True)
class Artefact:
    """A file, or a folder with a manifest.json, that entries read; it is made once for all entries and seeds.

    Attributes:
        title: its name in messages, such as "region cache".
        key: configuration key that names it.
        path: below the folder of the experiment; an absolute path stays as it is.
        command: a program and its arguments that make it: an importable module, or a script of a checkout
            ("projects/CLIM/train.py"). "{path}" stands for the path, "{folder}" for the folder that it lies in,
            "{weights}" for those of ``weights_of``. Empty: the user provides the artefact.
        inputs: what the result depends on, {name: a file, or a function that returns a hash}.
        weights_of: entry whose weights, trained with seed 0, are another input, named "detector".
        training_only: it is read in training, not when the trained weights are evaluated.
    """

    title: str
    key: str
    path: str
    command: tuple[str, ...] = ()
    inputs: Mapping[str, Path | Callable[[], str]] = field(default_factory=dict)
    weights_of: str = ""
    training_only: bool = False


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    Attributes:
        title: of its row in the table.
        config: yaml of the detector, below configs/ or any path; empty for an entry with a ``command``.
        overrides: (KEY, VALUE, ...) of the configuration.
        needs: names of the artefacts that it reads.
        weights_of: another entry, whose weights of the same seed are evaluated; empty: the entry is trained.
        weights: weight file given by the user, which is evaluated.
        command: a program and its arguments, see :class:`Artefact`, that is run instead of the training program and
            writes "{folder}"/report.json.
        folder: of its files, below the folder of the experiment. Without "{seed}" the result does not depend on the
            seed of the command line.
        facts: function of the entry's configuration, artefacts included, that gives further values for columns and
            results.json, ready for json.
        settings_by: the set on which its settings were chosen, "val"; a column ("settings_by",) shows it.
    """

    title: str
    config: str = ""
    overrides: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    weights_of: str = ""
    weights: str = ""
    command: tuple[str, ...] = ()
    folder: str = "{name}/seed{seed}"
    facts: Callable[[CfgNode], dict[str, Any]] | None = None
    settings_by: str = ""

    @property
    def is_seeded(self) -> bool:
        """Whether it is run once for each seed."""
        return "{seed}" in self.folder


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        path: of the value within the report, ("bbox", "AP50-novel"), or within the entry's facts, ("facts", "rho"). Also
            ("settings_by",) of the entry and ("readings",) of :attr:`Experiment.weights_from`.
        show: the text of a value; None: mean and standard deviation over the seeds, with one decimal.
        required: a report without this figure is an error, because the user requested it; otherwise the cell is "-".
    """

    path: tuple[str, ...]
    show: Callable[[Any], str] | None = None
    required: bool = False


def _no_inputs(cfg: CfgNode | None) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Experiment:
    """A table of entries.

    Attributes:
        entries: {name: entry} in the order of the table.
        columns: {title: column}.
        artefacts: {name: artefact} that entries need.
        inputs: function of an entry's configuration (None for one with a command) that gives hashes of what its result
            depends on in addition to the configuration, its weights and its artefacts.
        heading: of the column of titles.
        marker: a markdown file that the table goes to has the lines "<!-- <marker> table..." and "<!-- end of <marker>
            table -->"; empty: the table goes to no file.
        shared_detector: all entries evaluate one detector and differ only in what is read at test, so that it is built
            once, in this process. Nothing is trained: a row of other inputs is evaluated again instead of refused.
        accept_unmarked: finished runs and artefacts that do not record their inputs are accepted.
        pictures: {file name: function of the rows of results.json and a path that draws it}.
        weights_from: the experiment that trains, given for one that makes the final table: the entries named in
            ``weights_of`` and the artefacts that are not in ``artefacts`` are those of ``weights_from``, in the folder
            of the command. Only such an experiment may read held-out test sets
            (:func:`~ovdet2.data.datasets.register.validation_set_of`); each reading is logged
            (:mod:`ovdet2.experiments.readings`).
        folder: of its files, below the folder of the command.
    """

    entries: Mapping[str, Entry]
    columns: Mapping[str, Column]
    artefacts: Mapping[str, Artefact] = field(default_factory=dict)
    inputs: Callable[[CfgNode | None], dict[str, str]] = _no_inputs
    heading: str = "row"
    marker: str = ""
    shared_detector: bool = False
    accept_unmarked: bool = False
    pictures: Mapping[str, Callable[[Sequence[dict[str, Any]], Path], None]] = field(default_factory=dict)
    weights_from: Experiment | None = None
    folder: str = ""


@dataclass(frozen=True)
class Plan:
    """An experiment for the command line.

    Attributes:
        description: of its --help.
        build: the experiment for parsed arguments: those of ``add_arguments``, ``output`` (Path) and ``passed_on`` (list
            of words after "--").
        add_arguments: adds its own options.
        output: default folder; empty: --output must be given.
    """

    description: str
    build: Callable[[Namespace], Experiment]
    add_arguments: Callable[[ArgumentParser], None] = lambda parser: None
    output: str = ""
