r"""Write report.html for the folder of an evaluation.

    ovdet2 report make output/ovshapes/vild_ensemble/seed0/inference/ov_shapes_val_all
    # an evaluation that stopped after inference: measure its predictions first, then write the report
    ovdet2 report make output/ovshapes/vild_ensemble/seed0/inference/ov_shapes_val_all --dataset ov_shapes_val_all
    # with intervals of AP by 1,000 resamples of the images
    ovdet2 report make output/ovshapes/vild_ensemble/seed0/inference/ov_shapes_val_all --bootstrap 1000

The folder must hold predictions.jsonl and, without --dataset, report.json.

Exit codes: 2 usage, 3 data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog

from ovdet2.command_line import add_config_file, command_parser, dataset_files, keep_inputs
from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.evaluation.bootstrap import RESAMPLES
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.evaluation import REPORT, Evaluation, load_evaluation, resampled
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.io.files import write_json
from ovdet2.report.html_report import write_html


def main(argv: Sequence[str] | None = None) -> Path:
    """Command line; returns the path that was written."""
    args = parse_args(argv)
    load_config(args.config_file)  # registers its DATASETS.OWN
    dataset = args.dataset
    if not dataset:
        dataset = read_report(args.folder / REPORT)["dataset"]
    if dataset not in DatasetCatalog.list():
        raise UsageError(f"the data set {dataset!r} is not registered: give the run's config.yaml with --config-file.")
    split = split_of(dataset)
    if split is None:
        raise UsageError(f"the data set {dataset!r} has no base and novel classes: give another one with --dataset.")
    output = args.output or args.folder / "report.html"
    read = args.config_file, args.folder / REPORT, args.folder / MERGED, dataset_files(dataset)
    keep_inputs("--output", [output], read)
    if args.dataset:
        resamples = RESAMPLES if args.bootstrap is None else args.bootstrap
        evaluation = OpenVocabularyEvaluator(dataset, args.folder, resamples=resamples).measure_again()
    else:
        evaluation = load_evaluation(args.folder, dataset)
        if args.bootstrap is not None:
            _add_intervals(args.folder, evaluation, split, args.bootstrap)
    keep_inputs("--output", [output], (image["file_name"] for image in evaluation.truth.images.values()))
    write_html(output, evaluation.report, evaluation.truth, evaluation.detections, split, args.pictures)
    print(output)
    return output


def _add_intervals(folder: Path, evaluation: Evaluation, split: Split, resamples: int) -> None:
    """Make the intervals of AP, and write them into report.json as well."""
    report, truth = evaluation.report, evaluation.truth
    if report.get("scores_tell_nothing"):
        raise UsageError("there is no AP without scores, hence no interval: remove --bootstrap.")
    metric, limit = report["evaluator_type"], report["detections_per_image"]
    report["bootstrap"] = resampled(truth, evaluation.detections, split, metric, limit, resamples)
    write_json(folder / REPORT, report, indent=1)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program.

    Raises:
        UsageError: --pictures is negative, or --bootstrap below 1.
    """
    parser = command_parser("report make", __doc__)
    parser.add_argument("folder", type=Path, help="folder with report.json and predictions.jsonl")
    parser.add_argument(
        "--dataset", default="", help="measure predictions.jsonl on this data set and write report.json first"
    )
    add_config_file(parser, required=False, purpose="only for a data set in the DATASETS.OWN of the run's config.yaml")
    parser.add_argument("--output", type=Path, help="file to write; default: report.html in the folder")
    parser.add_argument("--pictures", type=int, default=6, help="number of worst, and of best, images to draw (6)")
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help="resamples of the images for the intervals of AP, also in report.json",
    )
    args = parser.parse_args(argv)
    if args.bootstrap is not None and args.bootstrap < 1:
        raise UsageError("--bootstrap must be at least 1: change it.")
    if args.pictures < 0:
        raise UsageError("--pictures must be at least 0: change it.")
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
