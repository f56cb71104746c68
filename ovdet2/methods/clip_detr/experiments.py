"""CLIP-DETR's ablations: the paper's Tables 4 to 8, and some further ones.

Each entry is the same configuration, which has both parts, with some keys of MODEL.CLIP_DETR changed. Several tables
share the entry of the complete method (rho 1).
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from ovdet2.command_line import add_config_file
from ovdet2.config import load_config
from ovdet2.errors import UsageError
from ovdet2.experiments import Column, Entry, Experiment, Plan
from ovdet2.experiments.command import overrides_in

WHOLE = "CLIP-DETR"


def _betas(*values: float) -> dict[str, Any]:
    return {"BETAS": list(values)}


# Entry: keys of MODEL.CLIP_DETR that differ from the configuration's. Table 0 varies choices that the paper does not
# state; table 8 is in its appendix.
TABLES: dict[int, dict[str, dict[str, Any]]] = {
    0: {
        **{f"align weight {weight}": {"ALIGN_WEIGHT": weight} for weight in (0.25, 0.5, 1.0, 2.0)},
        "one label is no negative": {"IGNORED_PAIRS": "label"},
        "signed shifts": {"SHIFT": "signed"},
        "corner noise": {"SHIFT": "corners"},
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
    8: {f"rho {rho}": {"RHO": rho} for rho in (0.1, 0.4, 0.8, 1.0, 1.5)},
}


def build_ablations(args: Namespace) -> Experiment:
    """The entries of the chosen tables.

    Raises:
        UsageError: a weight of CLIP-DETR is 0.
    """
    cfg = load_config(args.config_file)
    if not cfg.MODEL.CLIP_DETR.ALIGN_WEIGHT or not cfg.MODEL.CLIP_DETR.DYNAMIC_WEIGHT:
        raise UsageError(
            f"{args.config_file} lacks a part of CLIP-DETR: use a configuration with both weights above 0."
        )
    complete = load_config(args.config_file, [*overrides_in(args.passed_on), *overrides_of({})])
    entries = {}
    for name, keys in ((name, keys) for number in args.tables for name, keys in TABLES[number].items()):
        overrides = overrides_of(keys)
        changed = complete.clone()
        changed.merge_from_list(list(overrides))
        folder = f"{WHOLE}/seed{{seed}}" if changed == complete else "{name}/seed{seed}"
        entries[name] = Entry(name, args.config_file, overrides, folder=folder)
    return Experiment(entries, {args.figure: Column(("bbox", args.figure), required=True)})


def overrides_of(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of MODEL.CLIP_DETR as command-line overrides; the expected results do not apply to an ablation."""
    changed = [word for key, value in keys.items() for word in (f"MODEL.CLIP_DETR.{key}", str(value))]
    return ("TEST.EXPECTED_RESULTS", "[]", *changed)


def _add_arguments(parser: ArgumentParser) -> None:
    add_config_file(parser, purpose="of the complete method")
    parser.add_argument("--tables", nargs="+", type=int, choices=TABLES, default=list(TABLES))
    parser.add_argument("--figure", default="AP-all", help='of the report\'s "bbox", such as AP50-novel')


PLANS = {
    "ablations": Plan(
        "Run the ablations of CLIP-DETR's Tables 4 to 8, and further ones (table 0), on any configuration of the complete "
        'method. Arguments after "--" are passed to the training program.',
        build_ablations,
        _add_arguments,
    )
}
