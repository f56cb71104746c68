#!/usr/bin/env python
"""Make the OV-COCO (48 base, 17 novel classes) annotation files from the official COCO 2017 ones.

    python datasets/prepare_ov_coco.py [--root FOLDER] [--json FOLDER]

Reads instances_train2017.json and instances_val2017.json; writes ov_coco_train_base.json (base classes only) and
ov_coco_val_all.json (base and novel) beside them. Running it again changes nothing.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from ovdet2.data.datasets.coco_json import data_root
from ovdet2.data.datasets.prepare import prepare_split
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.errors import exit_on_error

# Images in the official files, and how many remain in OV-COCO as published since OVR-CNN (Zareian et al. 2021).
OFFICIAL = {"ov_coco_train_base.json": (118_287, 107_761), "ov_coco_val_all.json": (5_000, 4_836)}


def parse_args(argv=None):
    """Command line: --root and --json."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Expected folders: datasets/README.md"
    )
    parser.add_argument("--root", type=Path, help="COCO folder (default: coco below $DETECTRON2_DATASETS or datasets)")
    parser.add_argument("--json", type=Path, help="folder of the annotation files (default: annotations below --root)")
    return parser.parse_args(argv)


def verdict(name, report):
    """One sentence on whether a prepared file has the published number of images."""
    official, published = OFFICIAL[name]
    if report["images_read"] != official:
        return f"not the official file: {report['images_read']:,} images were read, the official one has {official:,}"
    if report["images"] != published:
        return f"{published:,} images are expected from the official file: download it again, this one was altered"
    return f"matches the published {published:,} images"


def main(argv=None):
    """Prepare both files and print their counts."""
    args = parse_args(argv)
    annotations = args.json or (args.root or data_root() / "coco") / "annotations"
    remedy = "download annotations_trainval2017.zip from cocodataset.org and unpack it there (datasets/README.md)"
    files = tqdm(prepare_split(annotations, "ov_coco", OV_COCO, remedy), total=len(OFFICIAL), unit="file", leave=False)
    for path, report in files:
        lines = [
            f"{path}: {'written' if report['written'] else 'already up to date'}",
            f"  {report['images']:,} images, {report['annotations']:,} annotations ({report['crowds']} crowd), "
            f"{report['categories']} classes",
            f"  {verdict(path.name, report)}",
        ]
        if report["degenerate"]:
            lines.append(f"  dropped, box without area: annotations {', '.join(map(str, report['degenerate']))}")
        files.write("\n".join(lines))


if __name__ == "__main__":
    with exit_on_error():
        main()
