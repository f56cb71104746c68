"""Make the COCO-format annotation file of PASCAL VOC 2007 test, a transfer target.

    ovdet2 dataset prepare voc --root datasets/VOC2007

Reads Annotations/*.xml and ImageSets/Main/test.txt in the folder and writes voc_2007_test.json to it. A file that is
already up to date is not written again.

Exit codes: 2 usage, 3 data.
"""

from collections.abc import Sequence
from pathlib import Path

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.prepare import summary, write_prepared
from ovdet2.data.datasets.register import all_novel, data_root
from ovdet2.data.datasets.voc import voc_json
from ovdet2.errors import exit_on_error

# VOC2007 test (Everingham et al. 2010): images, and objects that are not difficult.
PUBLISHED = (4_952, 12_032)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: write the json and print its counts."""
    parser = command_parser("dataset prepare voc", __doc__)
    parser.add_argument("--root", type=Path, help="VOC folder; default: VOC2007 in $DETECTRON2_DATASETS or datasets")
    parser.add_argument("--subset", default="test", help="list in ImageSets/Main (test)")
    args = parser.parse_args(argv)
    folder = args.root or data_root() / "VOC2007"
    data = voc_json(folder, args.subset)
    target = folder / f"voc_2007_{args.subset}.json"
    difficult = sum(annotation["iscrowd"] for annotation in data["annotations"])
    images, objects = len(data["images"]), len(data["annotations"]) - difficult
    same = (images, objects) == PUBLISHED
    verdict = "as published" if same else f"the official test set has {PUBLISHED[0]:,} and {PUBLISHED[1]:,}"
    report = {key: len(data[key]) for key in ("images", "annotations", "categories")}
    report |= {"degenerate": [], "verdict": verdict if args.subset == "test" else "counts not checked"}
    split = all_novel("PASCAL VOC 2007, 20 classes", data["categories"], target)
    report = write_prepared(target, data, report, split, {"source": f"Annotations of {args.subset}"})
    print(summary(target, report, f"{images:,} images, {objects:,} objects, {difficult:,} difficult ones as crowds"))


if __name__ == "__main__":
    with exit_on_error():
        main()
