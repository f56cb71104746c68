r"""Make the annotation files of OV-COCO (48 base, 17 novel classes).

    # from the official COCO 2017 files in datasets/coco/annotations
    ovdet2 dataset prepare ov-coco --root datasets/coco
    # from OV-COCO files of another code base
    ovdet2 dataset prepare ov-coco --root datasets/coco \
        --from instances_train2017_seen_2.json instances_val2017_all_2.json

Writes ov_coco_train_base.json (base classes only) and ov_coco_val_all.json (base and novel classes) to the annotation
folder, with COCO's category ids. A file that is already up to date is not written again.

Exit codes: 2 usage, 3 data.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.dialects import import_ov_coco
from ovdet2.data.datasets.prepare import Official, prepare_split, summary
from ovdet2.data.datasets.register import data_root
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.errors import exit_on_error

# Sizes of COCO 2017, and the images of OV-COCO as published since OVR-CNN (Zareian et al. 2021). Those with base and with
# novel classes are in issues 7 and 17 of its repository.
OFFICIAL = {
    "ov_coco_train_base.json": Official(118_287, 860_001, {"images": 107_761}),
    "ov_coco_val_all.json": Official(5_000, 36_781, {"images": 4_836, "base_images": 4_533, "novel_images": 2_064}),
}
REMEDY = "download annotations_trainval2017.zip from cocodataset.org and unpack it there (datasets/README.md)"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("dataset prepare ov-coco", __doc__)
    parser.add_argument("--root", type=Path, help="COCO folder; default: coco in $DETECTRON2_DATASETS or datasets")
    parser.add_argument("--json", type=Path, help="folder of the annotation files; default: annotations in --root")
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="import OV-COCO files of another code base, for training, testing or both: OVR-CNN, Detic (_oriorder), VLDet, "
        "CLIPSelf (_65_cat), RegionCLIP, wusize (BARON, CLIM) or OADP; the layout is recognised",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: prepare the files and print their counts."""
    args = parse_args(argv)
    folder = args.json or (args.root or data_root() / "coco") / "annotations"
    if args.sources:
        prepared = import_ov_coco(args.sources, folder, OFFICIAL)
    else:
        prepared = prepare_split(folder, "ov_coco", OV_COCO, REMEDY, OFFICIAL)
    for path, report in prepared:
        counts = (
            f"{report['images']:,} images, {report['annotations']:,} annotations ({report['crowds']} crowd), "
            f"{report['categories']} classes"
        )
        tqdm.write(summary(path, report, *report.get("layouts", ()), counts))


if __name__ == "__main__":
    with exit_on_error():
        main()
