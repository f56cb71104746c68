"""Make the OV-LVIS training file (base classes: frequent and common; novel: rare) from the official LVIS ones.

    ovdet2 dataset prepare ov-lvis [--root FOLDER] [--json FOLDER] [--version v1]

Reads lvis_v1_train.json and writes ov_lvis_train_base.json beside it: without annotations of rare classes, and without
rare classes among the negatives of an image. lvis_v1_val.json, and lvis_v1_minival.json if it is there, are the test
files as they are: they are only counted. Running it again changes nothing.
"""

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


def parse_args(argv=None):
    """Command line: --root, --json and --version."""
    parser = command_parser("dataset prepare ov-lvis", __doc__)
    parser.add_argument("--root", type=Path, help="LVIS folder (default: lvis below $DETECTRON2_DATASETS or datasets)")
    parser.add_argument("--json", type=Path, help="folder of the annotation files (default: --root)")
    parser.add_argument("--version", default="v1", help="of LVIS, as in the names of its files (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    """Prepare the training file, look at the test files, print the counts."""
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
            f"{report['negatives_masked']:,} novel classes taken out of the negatives of images",
        )
    )
    for subset in ("val", "minival"):
        path = folder / f"lvis_{args.version}_{subset}.json"
        if path.is_file():
            found = check_lvis_test(path, split, remedy, OFFICIAL.get(path.name))
            print(
                f"{path}: used as it is\n  {found['images_read']:,} images, {found['annotations_read']:,} annotations, "
                f"{found['novel_annotations']:,} of novel classes\n  {found['verdict']}"
            )
        elif subset == "val":
            print(f"{path}: not there; testing needs it, training does not. To get it, {remedy}")


if __name__ == "__main__":
    with exit_on_error():
        main()
