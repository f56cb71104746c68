r"""Write report.html for an evaluation folder.

    python tools/make_report.py output/ovshapes/vild_ensemble/seed0/inference/ov_shapes_val_all

The folder holds report.json and predictions.jsonl; the data set is the one that report.json names, unless --dataset
names it. Exit codes: 2 usage, 3 data.
"""

import argparse
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

import ovdet2.data.datasets  # noqa: F401  registers the data sets
from ovdet2.data.datasets.register import split_of
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.html_report import write_html
from ovdet2.evaluation.prediction_files import MERGED, read_merged
from ovdet2.files import read_json, sha256_file
from ovdet2.vocabulary import Vocabulary


def main(argv=None):
    """Command line; returns the path written."""
    args = parse_args(argv)
    report = read_json(args.folder / "report.json", "give the folder of a finished evaluation")
    truth, split = read_truth(args.dataset or report["dataset"], report)
    vocabulary = Vocabulary.load(args.vocabulary) if args.vocabulary else None
    output = args.output or args.folder / "report.html"
    write_html(output, report, truth, read_detections(args.folder / MERGED), split, vocabulary, args.pictures)
    print(output)
    return output


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with report.json and predictions.jsonl")
    parser.add_argument("--dataset", help="registered name of the data set; default: that of report.json")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary file of the detector, whose fingerprint is stated")
    parser.add_argument("--output", type=Path, help="file to write; default: report.html in the folder")
    parser.add_argument("--pictures", type=int, default=6, help="images drawn of the worst, and of the best")
    args = parser.parse_args(argv)
    if args.pictures < 0:
        raise UsageError("--pictures is at least 0: change it.")
    return args


def read_truth(name, report):
    """(truth, split) of a registered data set.

    Raises:
        UsageError: it is not registered, or has no base / novel split.
        DataError: its json is not the one that was evaluated on.
    """
    if name not in DatasetCatalog.list():
        raise UsageError(f"the data set {name!r} is not registered: name one of ovdet2 with --dataset.")
    split = split_of(name)
    if split is None:
        raise UsageError(f"the data set {name!r} has no base / novel split: register it with register_ov_dataset.")
    records = DatasetCatalog.get(name)
    json_file = MetadataCatalog.get(name).json_file
    if sha256_file(json_file) != report.get("json_sha256"):
        raise DataError(f"{json_file} is not the annotation file that was evaluated on: set DETECTRON2_DATASETS to it.")
    return Truth.of(records, split), split


def read_detections(path):
    """:class:`~ovdet2.evaluation.columns.Detections` of a merged file of predictions."""
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the folder of a finished evaluation.")
    records = list(read_merged(path))
    counts = [len(record["scores"]) for record in records]

    def column(key, dtype):
        return np.array([value for record in records for value in record[key]], dtype=dtype)

    return Detections(
        image_ids=np.repeat(np.array([record["image_id"] for record in records], dtype=np.int64), counts),
        category_ids=column("category_ids", np.int32),
        scores=column("scores", np.float32),
        boxes_xyxy=column("boxes_xyxy", np.float32).reshape(-1, 4),
    )


if __name__ == "__main__":
    with exit_on_error():
        main()
