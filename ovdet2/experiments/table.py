"""The table of an experiment: mean and spread over seeds, in markdown."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError, UsageError
from ovdet2.experiments.entry import Column, Experiment
from ovdet2.io.files import write_text


def make_table(experiment: Experiment, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown table.

    Args:
        experiment: its titles and columns.
        results: {name of an entry: a result for each finished seed}, see :meth:`Runner.result`; entries without any
            are not in the table.

    Raises:
        UsageError: a required figure does not exist.
    """
    seeded = any(entry.is_seeded for entry in experiment.entries.values())
    heads = [*experiment.columns, "minutes", *(["seeds"] if seeded else [])]
    lines = [f"| {' | '.join([experiment.heading, *heads])} |", "|---|" + "---:|" * len(heads)]
    for name, seeds in results.items():
        if not seeds:
            continue
        cells = [_cell(column, seeds) for column in experiment.columns.values()]
        cells.append(mean_and_spread([result.get("minutes") for result in seeds]))
        cells += [str(len(seeds))] if seeded else []
        lines.append(f"| {' | '.join([experiment.entries[name].title, *cells])} |")
    return "\n".join(lines)


def value_of(column: Column, result: Mapping[str, Any]) -> Any:
    """The value of a column in one result; None where it does not exist.

    Raises:
        UsageError: it is required and does not exist.
    """
    value, known = result, []
    for key in column.path:
        known = list(value) if isinstance(value, Mapping) else []
        value = value.get(key) if isinstance(value, Mapping) else None
    if column.required and column.path[-1] not in known:
        raise UsageError(f"no figure {column.path[-1]!r}: the report has {', '.join(known)}.")
    return value


def mean_and_spread(values: Sequence[float | None]) -> str:
    """ "61.2 ± 1.3", "61.2" for one value, "-" where a figure does not exist."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "-"
    mean = f"{statistics.mean(numbers):.1f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.1f}"


def insert_table(path: Path, marker: str, table: str, command: str) -> None:
    """Replace the text between the two markers of a markdown file by a table and the command that made it.

    Raises:
        DataError: the markers are not there.
    """
    text = path.read_text(encoding="utf-8")
    begin = re.search(rf"^<!-- {re.escape(marker)} table.*-->$", text, re.MULTILINE)
    end = f"<!-- end of {marker} table -->"
    if begin is None or end not in text[begin.end() :]:
        raise DataError(f"{path} has no lines '<!-- {marker} table -->' and {end!r} to put the table between.")
    after = text[begin.end() :].split(end, 1)[1]
    write_text(path, f"{text[: begin.end()]}\n`{command}`\n\n{table}\n{end}{after}")


def _cell(column: Column, seeds: Sequence[Mapping[str, Any]]) -> str:
    values = [value_of(column, result) for result in seeds]
    if column.show is None:
        return mean_and_spread(values)
    return "-" if values[0] is None else column.show(values[0])
