r"""Evaluate one trained CCKT-Det under many priors (the paper's Table 6): files x thresholds rho x lengths L.

    python tools/sweep_cckt_priors.py --config-file configs/ovshapes/cckt_full_r18.yaml --rho 0.7,0.9 --top 6,12 \
        --priors output/priors/oracle.safetensors output/priors/clip.safetensors output/priors/random.safetensors \
        --output output/ovshapes/cckt_sweep MODEL.WEIGHTS output/ovshapes/cckt_full/model_final.pth

The weights stay as they are: only what the detector is told of an image changes. Writes <output>/results.json,
<output>/table.md (AP50 beside precision and recall of the priors) and <output>/curve.png (novel AP50 against the novel
recall of the priors). What is in results.json is not evaluated again, so that the same command goes on after an
interruption; with other weights or another configuration it starts anew. Exit codes as of train_net.py.
"""

import argparse
import hashlib
from pathlib import Path

from detectron2.utils.logger import setup_logger

from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.records import load_records
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.files import atomic_path, read_json, sha256_file, write_json, write_text
from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.priors.quality import quality
from ovdet2.priors.truth import truth_of

FIGURES = ("AP50-novel", "AP50-base", "AP50-all")


def main(argv=None):
    """Command line; returns the rows, dicts by prior, rho and L."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.overrides)
    if not (cfg.MODEL.CCKT.ENABLED and cfg.MODEL.CCKT.PRIORS):
        raise UsageError(f"{args.config_file} has no semantic priors (MODEL.CCKT.PRIORS): there is nothing to vary.")
    from ovdet2.engine import Trainer  # slow to import, so after the errors a user makes most

    setup_logger(name="ovdet2")
    output = Path(args.output)
    made_of = {
        "weights": sha256_file(cfg.MODEL.WEIGHTS),
        "configuration": hashlib.sha256(cfg.dump().encode()).hexdigest(),
    }
    known = read_json(output / "results.json") if (output / "results.json").is_file() else {}
    rows = known["rows"] if known.get("made_of") == made_of else []
    done = {(row["content_sha256"], row["rho"], row["top"]) for row in rows}
    [name] = cfg.DATASETS.TEST
    split, model = split_of(name), None
    truth = truth_of(load_records([name], "DATASETS.TEST", False), split)
    for path in args.priors:
        priors = ConceptPriors(path)
        for judged in quality(priors, truth, split, args.rho, args.top):
            key = priors.manifest["content_sha256"], judged["rho"], judged["top"]
            if key in done:
                continue
            model = model or Trainer.build_trained(cfg)
            rows.append(judged | evaluated(cfg, model, path, judged, output) | {
                "prior": Path(path).stem, "kind": priors.kind, "content_sha256": key[0],
            })  # fmt: skip
            write_json(output / "results.json", {"made_of": made_of, "rows": rows}, indent=1)
    wanted = {ConceptPriors(path).manifest["content_sha256"] for path in args.priors}
    rows = [r for r in rows if r["content_sha256"] in wanted and r["rho"] in args.rho and r["top"] in args.top]
    table = as_markdown(rows)
    write_text(output / "table.md", table)
    draw(rows, output / "curve.png")
    print(table)
    return rows


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="yaml of the detector")
    parser.add_argument("--priors", nargs="+", required=True, help="files of tools/build_concept_priors.py")
    parser.add_argument("--rho", type=_numbers(float), default=[0.7], help="thresholds, 0.7,0.9")
    parser.add_argument("--top", type=_numbers(int), default=[6], help="lengths L, 6,12")
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="MODEL.WEIGHTS model.pth, and KEY VALUE ...")
    return parser.parse_args(argv)


def _numbers(kind):
    return lambda text: [kind(number) for number in text.split(",")]


def evaluated(cfg, model, path, judged, output):
    """Figures of the detector with one prior."""
    from ovdet2.engine import Trainer

    chosen = cfg.clone()
    chosen.MODEL.CCKT.PRIOR_FILE = str(path)
    chosen.MODEL.CCKT.PRIOR_THRESHOLD, chosen.MODEL.CCKT.PRIOR_TOP = judged["rho"], judged["top"]
    chosen.TEST.HTML_REPORT, chosen.TEST.EXPECTED_RESULTS = False, []
    chosen.OUTPUT_DIR = str(output / f"{Path(path).stem}_rho{judged['rho']:g}_top{judged['top']}")
    results = Trainer.test(chosen, model)["bbox"]
    return {figure: results[figure] for figure in FIGURES}


def as_markdown(rows):
    """The table, percentages with one decimal."""
    lines = [
        "| prior | kind | rho | L | words | novel P / R | base P / R | novel AP50 | base AP50 | all AP50 |",
        "|---|---|" + "---:|" * 8,
    ]
    for row in rows:
        quality_of = (f"{_percent(row[group][0])} / {_percent(row[group][1])}" for group in ("novel", "base"))
        figures = (f"{row[figure]:.1f}" for figure in FIGURES)
        cells = (row["prior"], row["kind"], f"{row['rho']:g}", str(row["top"]), f"{row['words']:.1f}")
        lines.append("| " + " | ".join([*cells, *quality_of, *figures]) + " |")
    return "\n".join(lines) + "\n"


def _percent(value):
    return "-" if value is None else f"{100 * value:.1f}"


def draw(rows, path):
    """Novel AP50 against the novel recall of the priors; a point for each row, a line for each file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="novel recall of the priors, percent", ylabel="novel AP50")
    for name in dict.fromkeys(row["prior"] for row in rows):
        points = sorted((100 * (r["novel"][1] or 0.0), r["AP50-novel"]) for r in rows if r["prior"] == name)
        axes.plot(*zip(*points), marker="o", label=name)
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    with exit_on_error():
        main()
