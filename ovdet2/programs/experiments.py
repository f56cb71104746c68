r"""Run an experiment: train and evaluate the entries of a table, and write the table.

    # list the experiments, and the options of one
    ovdet2 experiment
    ovdet2 experiment clip_detr.ablations --help
    ovdet2 experiment ov-shapes --rows vild_text vild --seeds 0 1 2
    # the final table of the same runs, on the test set; each reading of it is logged
    ovdet2 experiment ov-shapes --rows vild_text vild --seeds 0 1 2 --split test
    # arguments of the training program come after --
    ovdet2 experiment ov-shapes --rows vild_text -- --num-gpus 8 SOLVER.MAX_ITER 100

An experiment is named <method>.<name> (PLANS in experiments.py of a method's directory), or by an import path. Inputs
that entries share are made once. A finished entry is not run again, an interrupted one continues, and an entry whose
folder was made from other inputs is refused. Sweeps, ablations and all rows that settings are chosen with refuse a
held-out test set. Writes <output>/table.md and <output>/results.json.

Exit codes: those of ovdet2 train.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovdet2.command_line import keep_inputs, options_but
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.experiments.entry import Plan
from ovdet2.experiments.find import find_plan, known_plans
from ovdet2.experiments.runner import Runner
from ovdet2.experiments.table import insert_table
from ovdet2.io.files import write_json, write_text

NAMED = {"ov-shapes": "ovdet2.ov_shapes.rows:PLAN"}


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Command line.

    Args:
        argv: name of the experiment and its options; None: those of the process.

    Returns:
        A flat dict for each entry and seed that is done, see :meth:`~ovdet2.experiments.runner.Runner.rows`.
    """
    name, *argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: ovdet2 experiment NAME ...\n\n{__doc__}\nExperiments: {', '.join([*NAMED, *known_plans()])}")
        return []
    plan, program = find_plan(NAMED.get(name, name)), f"ovdet2 experiment {name}"
    args = parse_args(plan, argv, program)
    experiment = plan.build(args)
    names = list(experiment.entries) if args.rows == ["all"] else args.rows
    unknown = [row for row in names if row not in experiment.entries]
    if unknown:
        raise UsageError(f"unknown rows {unknown}; there are {', '.join(experiment.entries)}.")
    if args.table and not experiment.marker:
        raise UsageError(
            f"the table of {name} goes to no file: remove --table, and use {args.output / experiment.folder}/table.md."
        )
    runner = Runner(experiment, args.output, args.passed_on)
    written = [runner.output / name for name in ("table.md", "results.json", *experiment.pictures)]
    keep_inputs("--output", written, options_but(args, "output"))
    for seed in () if args.tabulate else args.seeds:
        for row in names:
            runner.run(row, seed)
    results = runner.results(names, args.seeds)
    table, rows = runner.table(results), runner.rows(results)
    write_text(runner.output / "table.md", table + "\n")
    write_json(runner.output / "results.json", {"rows": rows}, indent=1)
    for file, draw in experiment.pictures.items():
        draw(rows, runner.output / file)
    print(table)
    left = [row for row in names if not results[row]]
    if left:
        print(f"\nNot run to the end: {', '.join(left)}.")
    if args.table:
        insert_table(Path(args.table), experiment.marker, table, f"{program} {shlex.join(shown(argv))}")
    return rows


def parse_args(plan: Plan, argv: Sequence[str], program: str) -> argparse.Namespace:
    """The options of an experiment."""
    parser = argparse.ArgumentParser(
        prog=program, description=plan.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    plan.add_arguments(parser)
    parser.add_argument("--rows", nargs="+", default=["all"], help="entries by name; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", required=not plan.output, default=plan.output, type=Path, help="folder of the runs")
    parser.add_argument("--table", help="markdown file whose table of this experiment is replaced")
    parser.add_argument("--tabulate", action="store_true", help="run nothing, write the table of what is done")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.passed_on = list(argv[cut + 1 :])
    return args


def shown(argv: Sequence[str]) -> list[str]:
    """A command line without the options that say where its table goes."""
    words, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in ("--table", "--output"):
            skip = True
        elif word != "--tabulate" and not word.startswith(("--table=", "--output=")):
            words.append(word)
    return words


if __name__ == "__main__":
    with exit_on_error():
        main()
