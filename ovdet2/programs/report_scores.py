r"""Calibration of an evaluation, and false positives on absent words.

    ovdet2 report scores output/ovshapes/vild/seed0/inference/ov_shapes_val_all
    # words that no image contains must be in the vocabulary of the evaluation
    ovdet2 eval --config-file ovshapes-vild TEST.DISTRACTORS "['hexagon', 'spiral', 'teapot']"
    ovdet2 report scores output/inference/ov_shapes_val_all --threshold 0.5 --absent "hexagon, teapot"

The folder must hold report.json and predictions.jsonl. Writes scores.json and scores.html to the folder.

Calibration: detections with a score of at least --floor, correct if the evaluator's greedy matching at IoU 0.5 assigns
them a box. Absent words: the distractors of the evaluation and, if the data set is annotated exhaustively, its words
without any annotation.

Exit codes: 2 usage, 3 data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovdet2.command_line import add_config_file, command_parser, keep_inputs
from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.evaluation.absent_words import THRESHOLD, absent_detections, absent_words
from ovdet2.evaluation.calibration import BINNINGS, BINS, FLOOR, calibration
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.evaluation import REPORT, load_evaluation
from ovdet2.evaluation.matching import match
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.evaluation.predictions import read_predictions
from ovdet2.io.files import write_json, write_text
from ovdet2.report.html_parts import page, text
from ovdet2.report.score_sections import absent_line, absent_section, calibration_lines, calibration_section
from ovdet2.vocabulary import parse_words

SCHEMA = "ovdet2/scores/1"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the content of scores.json."""
    args = parse_args(argv)
    load_config(args.config_file)  # registers its DATASETS.OWN
    dataset = read_report(args.folder / REPORT)["dataset"]
    paths = args.folder / "scores.json", args.folder / "scores.html"
    keep_inputs("FOLDER", paths, args.config_file)
    result = scores_of(args, dataset)
    title = f"Scores on {dataset}"
    sections = calibration_section(result["calibration"]), absent_section(result["absent_words"])
    write_json(paths[0], result, indent=1)
    write_text(paths[1], page(title, f"<h1>{text(title)}</h1>", *sections))
    print("\n".join(calibration_lines(result["calibration"])))
    absent = result["absent_words"]
    print(absent_line(absent) if absent else "No absent word: name some in TEST.DISTRACTORS of the evaluation.")
    print("\n".join(map(str, paths)))
    return result


def scores_of(args: argparse.Namespace, dataset: str) -> dict[str, Any]:
    """The content of scores.json.

    Raises:
        UsageError: a word of --absent that the evaluation does not have as an absent word.
    """
    evaluation = load_evaluation(args.folder, dataset)
    split = split_of(dataset)
    assert split is not None  # load_evaluation requires one
    truth, report = evaluation.truth, evaluation.report
    matches = match(truth, evaluation.detections, crowds=report["evaluator_type"] != "ov_voc")
    distractors = report.get("distractors") or []
    found = absent_detections(truth, read_predictions(args.folder / MERGED), split, distractors)
    if args.absent:
        if found is None:
            raise UsageError("this evaluation has no absent words: evaluate with them in TEST.DISTRACTORS.")
        found = found.only(parse_words(args.absent))
    return {
        "schema": SCHEMA,
        "dataset": dataset,
        "json_sha256": report["json_sha256"],
        "weights": report.get("weights"),
        "calibration": calibration(evaluation.detections, split, matches, args.floor, args.bins, args.binning),
        "absent_words": None if found is None else absent_words(found, len(truth.images), args.threshold),
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("report scores", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with report.json and predictions.jsonl")
    parser.add_argument("--floor", type=float, default=FLOOR, help=f"smallest score for the calibration ({FLOOR})")
    parser.add_argument("--bins", type=int, default=BINS, help=f"largest number of bins ({BINS})")
    parser.add_argument(
        "--binning",
        choices=BINNINGS,
        default="mass",
        help="bins of equal numbers of detections (mass), or of equal width",
    )
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"score above which a detection counts ({THRESHOLD})"
    )
    parser.add_argument("--absent", help='only these absent words, "hexagon, teapot" or a word list')
    add_config_file(parser, required=False, purpose="only for a data set in the DATASETS.OWN of the run's config.yaml")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with exit_on_error():
        main()
