r"""Run the ablations of CLIP-DETR's Tables 4 to 8, and some of ours, on any of its configurations, and tabulate them.

    python tools/ablate_clip_detr.py --tables 4 5 6 7 8 --config-file configs/coco/clip_detr_r50_12ep.yaml \
        --output output/coco/ablations -- --num-gpus 8
    python tools/ablate_clip_detr.py --config-file configs/ovshapes/clip_detr_both_closed_r18.yaml --figure AP-base \
        --rows CLIP-DETR label label+box "rho 0.1" "0.5 x 5" --output output/ovshapes/ablations
    python tools/ablate_clip_detr.py ... --tabulate

The configuration must have both parts; a row is that configuration with some keys changed. What follows "--" goes to
train_net.py. A row that was run to its end is not run again, and one of other settings is refused; several tables share
the row of the whole method, which is that of rho 1.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

from ovdet2.command_line import add_run_arguments
from ovdet2.config import load_config
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
_KEY = "MODEL.CLIP_DETR."
WHOLE = "CLIP-DETR"


def _betas(*values):
    return {"BETAS": list(values)}


# Row: keys of MODEL.CLIP_DETR that differ from the configuration's. Table 0 asks what the paper leaves open, table 8 is
# that of its appendix.
TABLES = {
    0: {
        **{f"align weight {weight}": {"ALIGN_WEIGHT": weight} for weight in (0.25, 0.5, 1.0, 2.0)},
        "one label is no negative": {"IGNORED_PAIRS": "label"},
        "literal shifts": {"SHIFT": "literal"},
        WHOLE: {},
    },
    4: {
        "baseline": {"ALIGN_WEIGHT": 0.0, "DYNAMIC_WEIGHT": 0.0},
        "+ AlignNet": {"DYNAMIC_WEIGHT": 0.0},
        "+ DynQL": {"ALIGN_WEIGHT": 0.0},
        WHOLE: {},
    },
    5: {"label": {"ATTRIBUTES": "label"}, "label+box": {"ATTRIBUTES": "label+box"}, WHOLE: {}},
    6: {"0.3 x 5": _betas(*[0.3] * 5), "0.5 x 5": _betas(*[0.5] * 5), "0.9 x 5": _betas(*[0.9] * 5), WHOLE: {}},
    7: {
        "0.3 x 1": _betas(0.3),
        "0.5 x 1": _betas(0.5),
        "0.9 x 1": _betas(0.9),
        WHOLE: {},
        "mixed x 2": _betas(*[0.1, 0.3, 0.5, 0.7, 0.9] * 2),
    },
    # Beyond 1 signed stretches give sides below 0.
    8: {**{f"rho {rho}": {"RHO": rho} for rho in (0.1, 0.4, 0.8, 1.0)}, "rho 1.5": {"RHO": 1.5, "SHIFT": "literal"}},
}


def main(argv=None):
    """Command line; returns {row: figure in percent, or None where there is no report}."""
    args = parse_args(argv)
    rows = {name: keys for number in args.tables for name, keys in TABLES[number].items()}
    unknown = [name for name in args.rows or () if name not in rows]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: no row of tables {args.tables}, which have {', '.join(rows)}.")
    clip = load_config(args.config_file).MODEL.CLIP_DETR
    if not clip.ALIGN_WEIGHT or not clip.DYNAMIC_WEIGHT:
        raise UsageError(f"{args.config_file} lacks a part of CLIP-DETR: give one with both weights above 0.")
    figures = {}
    for name in args.rows or rows:
        for seed in args.seeds:
            if report_of(args, name, rows[name], seed) is None and not args.tabulate:
                write_json(folder_of(args, name, rows[name], seed) / "row.json", settings_of(args, rows[name], seed))
                run(command_of(args, name, rows[name], seed))
        found = [report_of(args, name, rows[name], seed) for seed in args.seeds]
        found = [figure_of(report, args.figure) for report in found if report is not None]
        figures[name] = sum(found) / len(found) if found else None
    print(f"| row | {args.figure}, mean over seeds {' '.join(map(str, args.seeds))} |\n|---|---:|")
    for name, figure in figures.items():
        print(f"| {name} | {'-' if figure is None else f'{figure:.1f}'} |")
    return figures


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="yaml of the whole method")
    parser.add_argument("--tables", nargs="+", type=int, choices=TABLES, default=list(TABLES))
    parser.add_argument("--rows", nargs="+", help="of these tables; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--figure", default="AP-all", help='of the report\'s "bbox", such as AP50-novel')
    parser.add_argument("--output", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--tabulate", action="store_true", help="run nothing")
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.passed_on, args.output = argv[cut + 1 :], args.output.resolve()
    return args


def folder_of(args, name, keys, seed):
    """Where a row's run is: one whose keys change nothing is the whole method."""
    if settings_of(args, keys, seed) == settings_of(args, {}, seed):
        name = WHOLE
    return args.output / name.replace(" ", "_").replace("+", "plus") / f"seed{seed}"


def report_of(args, name, keys, seed):
    """The report of a row's only test set, or None where it was not run to its end.

    Raises:
        DataError: its folder holds a run of other settings, or one that does not say of which.
    """
    folder = folder_of(args, name, keys, seed)
    known = read_json(folder / "row.json") if (folder / "row.json").is_file() else None
    if folder.is_dir() and known != settings_of(args, keys, seed):
        raise DataError(f"{folder} holds a row of another configuration: remove it, or choose another --output.")
    [path, *_] = [*folder.glob("inference/*/report.json"), None]
    return read_json(path) if path and (folder / "model_final.pth").is_file() else None


def settings_of(args, keys, seed):
    """What decides a row's result: the configuration, whatever number of processes runs it."""
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    passed_on = parser.parse_args(["--config-file", args.config_file, *args.passed_on]).opts
    text = load_config(args.config_file, [*passed_on, *overrides_of(keys), "SEED", seed]).dump()
    return {"configuration": hashlib.sha256(text.encode()).hexdigest()}


def figure_of(report, name):
    """A figure of a report's boxes.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in report["bbox"]:
        raise UsageError(f"no figure {name!r}: the report has {', '.join(report['bbox'])}.")
    return report["bbox"][name]


def overrides_of(keys):
    """Keys of MODEL.CLIP_DETR as overrides of a configuration, whose own claim is not a row's."""
    return ["TEST.EXPECTED_RESULTS", "[]"] + [part for key, value in keys.items() for part in (_KEY + key, str(value))]


def command_of(args, name, keys, seed):
    """The command that trains and evaluates a row."""
    overrides = overrides_of(keys)
    command = [sys.executable, "train_net.py", "--config-file", args.config_file, "--resume", *args.passed_on]
    return [*command, *overrides, "SEED", str(seed), "OUTPUT_DIR", str(folder_of(args, name, keys, seed))]


def run(command):
    """Run a command in the project's folder.

    Raises:
        SystemExit: it failed; with its exit code.
    """
    print(" ".join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    with exit_on_error():
        main()
