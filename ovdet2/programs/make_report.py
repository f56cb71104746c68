r"""Write report.html for an evaluation folder.

    ovdet2 report make output/ovshapes/vild_ensemble/seed0/inference/ov_shapes_val_all

The folder holds report.json and predictions.jsonl. Exit codes: 2 usage, 3 data.
"""

from pathlib import Path

from detectron2.data import DatasetCatalog

from ovdet2.command_line import command_parser
from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.evaluation.evaluation import REPORT, load_evaluation
from ovdet2.io.files import read_json
from ovdet2.report.html_report import write_html


def main(argv=None):
    """Command line; returns the path written."""
    args = parse_args(argv)
    load_config(args.config_file)
    dataset = args.dataset
    if not dataset:
        remedy = "give the folder of a finished evaluation, or measure its predictions with --dataset"
        dataset = read_json(args.folder / REPORT, remedy).get("dataset")
    if dataset not in DatasetCatalog.list():
        raise UsageError(
            f"the data set {dataset!r} is not registered: name with --config-file the config.yaml of the run."
        )
    if args.dataset:
        evaluation = OpenVocabularyEvaluator(dataset, args.folder).measure_again()
    else:
        evaluation = load_evaluation(args.folder, dataset)
    output = args.output or args.folder / "report.html"
    write_html(output, evaluation.report, evaluation.truth, evaluation.detections, split_of(dataset), args.pictures)
    print(output)
    return output


def parse_args(argv):
    """The command line of this program."""
    parser = command_parser("report make", __doc__)
    parser.add_argument("folder", type=Path, help="folder with report.json and predictions.jsonl")
    parser.add_argument(
        "--dataset", default="", help="measure predictions.jsonl on this data set and write report.json"
    )
    parser.add_argument("--config-file", default="", help="of the run, for a data set that its DATASETS.OWN describes")
    parser.add_argument("--output", type=Path, help="file to write; default: report.html in the folder")
    parser.add_argument("--pictures", type=int, default=6, help="images drawn of the worst, and of the best")
    args = parser.parse_args(argv)
    if args.pictures < 0:
        raise UsageError("--pictures is at least 0: change it.")
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
