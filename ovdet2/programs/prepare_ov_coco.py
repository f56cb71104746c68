"""Make the OV-COCO (48 base, 17 novel classes) annotation files.

    ovdet2 dataset prepare ov-coco [--root FOLDER] [--json FOLDER]                   from the official COCO files
    ovdet2 dataset prepare ov-coco [--root FOLDER] [--json FOLDER] --from FILE ...   from those of another code base

Writes ov_coco_train_base.json (base classes only) and ov_coco_val_all.json (base and novel) to the annotation folder,
with COCO's own category ids. Running it again changes nothing.
"""

from pathlib import Path

from tqdm import tqdm

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.dialects import import_ov_coco
from ovdet2.data.datasets.prepare import Official, prepare_split, summary
from ovdet2.data.datasets.register import data_root
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.errors import exit_on_error

# Sizes of COCO 2017, and the images of OV-COCO as published since OVR-CNN (Zareian et al. 2021).
OFFICIAL = {
    "ov_coco_train_base.json": Official(118_287, 860_001, {"images": 107_761}),
    "ov_coco_val_all.json": Official(5_000, 36_781, {"images": 4_836}),
}
REMEDY = "download annotations_trainval2017.zip from cocodataset.org and unpack it there (datasets/README.md)"


def parse_args(argv=None):
    """Command line: --root, --json and --from."""
    parser = command_parser("dataset prepare ov-coco", __doc__)
    parser.add_argument("--root", type=Path, help="COCO folder (default: coco below $DETECTRON2_DATASETS or datasets)")
    parser.add_argument("--json", type=Path, help="folder of the annotation files (default: annotations below --root)")
    parser.add_argument(
        "--from",
        dest="sources",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="OV-COCO files of another code base, for training, testing or both: OVR-CNN, Detic (_oriorder), VLDet, "
        "CLIPSelf (_65_cat), RegionCLIP, wusize (BARON, CLIM) or OADP; the layout is recognised",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Prepare the files and print their counts."""
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
