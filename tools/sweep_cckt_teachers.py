r"""Train and evaluate CCKT-Det with several teachers (the paper's Table 5), one after another.

    python tools/sweep_cckt_teachers.py --config-file configs/ovshapes/cckt_full_r18.yaml \
        --teachers ovshapes-resnet:embedded ovshapes-vit:embedded --output output/ovshapes/cckt_teachers

A teacher is ARCHITECTURE:PRETRAINED of open_clip; it gives crops, words and priors. For each: the region cache of
annotated boxes, the CLIP priors of the test set, the training, all below <output>/<teacher>; then a table. Every step
goes on where it was interrupted, and is not done twice. Exit codes as of train_net.py.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("AP50-novel", "AP50-base", "AP50-all")


def main(argv=None):
    """Command line; returns the table."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.overrides)
    if not (cfg.MODEL.CCKT.ENABLED and cfg.MODEL.CCKT.PRIORS and cfg.MODEL.CCKT.CONTRAST != "none"):
        raise UsageError(
            f"{args.config_file} is no CCKT-Det with priors and contrast: its teacher would change little."
        )
    lines = ["| teacher | novel AP50 | base AP50 | all AP50 |", "|---|---:|---:|---:|"]
    for teacher in args.teachers:
        folder = Path(args.output) / teacher.replace(":", "_").replace("/", "_")
        for command in commands(args, cfg, teacher, folder):
            run(command)
        report = read_json(folder / "run" / "inference" / cfg.DATASETS.TEST[0] / "report.json")["bbox"]
        lines.append(f"| {teacher} | " + " | ".join(f"{report[figure]:.1f}" for figure in FIGURES) + " |")
    table = "\n".join(lines) + "\n"
    write_text(Path(args.output) / "table.md", table)
    print(table)
    return table


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="yaml of the detector")
    parser.add_argument("--teachers", nargs="+", required=True, metavar="ARCHITECTURE:PRETRAINED")
    parser.add_argument("--output", required=True, help="folder of the runs")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="KEY VALUE ... of all trainings")
    args = parser.parse_args(argv)
    wrong = [teacher for teacher in args.teachers if teacher.count(":") != 1 or teacher.strip(":") != teacher]
    if wrong:
        parser.error(f"--teachers {wrong[0]} is not ARCHITECTURE:PRETRAINED")
    return args


def commands(args, cfg, teacher, folder):
    """What is left to do for a teacher, as commands that a user would type.

    Args:
        args: of :func:`parse_args`.
        cfg: its configuration.
        teacher: "ARCHITECTURE:PRETRAINED".
        folder: of its files.

    Returns:
        list of lists of words.
    """
    architecture, pretrained = teacher.split(":")
    [train], [test] = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST
    cache, priors, run = folder / "annotation_cache", folder / "priors.safetensors", folder / "run"
    named = ["--architecture", architecture, "--pretrained", pretrained]
    config = ["--config-file", args.config_file]
    regions = [
        "tools/build_region_cache.py",
        *config,
        "--dataset",
        train,
        "--boxes",
        "annotations",
        "--output",
        str(cache),
    ]
    clip = ["tools/build_concept_priors.py", "--backend", "clip", "--dataset", test, "--output", str(priors)]
    clip += ["--tiles", str(cfg.MODEL.CCKT.PRIOR_TILES)]
    chosen = ["MODEL.TEACHER.ARCHITECTURE", architecture, "MODEL.TEACHER.PRETRAINED", pretrained]
    chosen += ["MODEL.CCKT.REGION_CACHE", str(cache), "MODEL.CCKT.PRIOR_FILE", str(priors), "OUTPUT_DIR", str(run)]
    left = [[*regions, *named]]
    if not priors.is_file():  # written whole or not at all
        left.append([*clip, *named])
    if not (run / "inference" / test / "report.json").is_file():
        left.append(["train_net.py", *config, "--resume", *args.overrides, *chosen])
    return left


def run(command):
    """Run a program of the project; its failure ends this one with its exit code."""
    print("$ python " + " ".join(command), flush=True)
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    with exit_on_error():
        main()
