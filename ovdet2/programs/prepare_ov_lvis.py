"""Make the training annotation file of OV-LVIS (base: frequent and common classes; novel: rare classes).

    ovdet2 dataset prepare ov-lvis --root datasets/lvis

Reads the official lvis_v1_train.json and writes ov_lvis_train_base.json to the same folder. It removes annotations of
rare classes, and rare classes among the negatives of an image. The test files lvis_v1_val.json and, if present,
lvis_v1_minival.json are used unchanged: they are only counted. A file that is already up to date is not written again.

Exit codes: 2 usage, 3 data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.lvis_split import check_lvis_test, prepare_lvis_train
from ovdet2.data.datasets.prepare import Official, summary
from ovdet2.data.datasets.register import data_root
from ovdet2.errors import exit_on_error

# Sizes of LVIS v1 (Gupta et al. 2019, lvisdataset.org), and OV-LVIS as of ViLD (Gu et al. 2022).
OFFICIAL = {
    "lvis_v1_train.json": Official(
        100_170,
        1_270_141,
        {"images": 100_170, "base_annotations": 1_264_884, "base_classes": 866, "novel_classes": 337},
    ),
    "lvis_v1_val.json": Official(19_809, 244_707, {"images_read": 19_809, "annotations_read": 244_707}),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("dataset prepare ov-lvis", __doc__)
    parser.add_argument("--root", type=Path, help="LVIS folder; default: lvis in $DETECTRON2_DATASETS or datasets")
    parser.add_argument("--json", type=Path, help="folder of the annotation files; default: --root")
    parser.add_argument("--version", default="v1", help="version of LVIS, as in the names of its files (v1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: prepare the training file, check the test files and print the counts."""
    args = parse_args(argv)
    folder = args.json or args.root or data_root() / "lvis"
    source = folder / f"lvis_{args.version}_train.json"
    target = folder / f"ov_lvis_{'' if args.version == 'v1' else f'{args.version}_'}train_base.json"
    remedy = "download it from lvisdataset.org and unpack it there (datasets/README.md)"
    split, report = prepare_lvis_train(source, target, remedy, OFFICIAL.get(source.name))
    print(
        summary(
            target,
            report,
            f"{report['images']:,} images, {report['annotations']:,} annotations of {report['base_classes']:,} base "
            f"classes; {report['categories']:,} categories listed, {report['novel_classes']:,} of them novel",
            f"{report['negatives_masked']:,} novel classes removed from the negatives of images",
        )
    )
    for subset in ("val", "minival"):
        path = folder / f"lvis_{args.version}_{subset}.json"
        if path.is_file():
            counts = check_lvis_test(path, split, remedy, OFFICIAL.get(path.name))
            print(
                f"{path}: used unchanged\n  {counts['images_read']:,} images, {counts['annotations_read']:,} annotations, "
                f"{counts['novel_annotations']:,} of novel classes\n  {counts['verdict']}"
            )
        elif subset == "val":
            print(f"{path}: missing; required for testing, not for training. To get it, {remedy}")


if __name__ == "__main__":
    with exit_on_error():
        main()
