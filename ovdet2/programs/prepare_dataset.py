"""Make the annotation files of a data set.

    ovdet2 dataset prepare ov-coco --root datasets/coco        # 48 base, 17 novel classes, from COCO 2017
    ovdet2 dataset prepare ov-lvis --root datasets/lvis        # 866 base, 337 novel classes, from LVIS v1
    ovdet2 dataset prepare voc --root datasets/VOC2007         # PASCAL VOC 2007 test as a COCO json, a transfer target
    ovdet2 dataset prepare ov-shapes --root datasets           # generate OV-Shapes, images included

``ovdet2 dataset prepare NAME --help`` lists the options of one. The expected folders are in datasets/README.md of the
repository.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from ovdet2.errors import UsageError, exit_on_error

MODULES = {
    "ov-coco": "ovdet2.programs.prepare_ov_coco",
    "ov-lvis": "ovdet2.programs.prepare_ov_lvis",
    "voc": "ovdet2.programs.prepare_voc",
    "ov-shapes": "ovdet2.ov_shapes.__main__",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line.

    Raises:
        UsageError: there is no such data set.
    """
    name, *options = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: ovdet2 dataset prepare NAME ...\n\n{__doc__}")
        return
    if name not in MODULES:
        raise UsageError(f"there is no data set {name!r} to prepare; there are {', '.join(MODULES)}.")
    importlib.import_module(MODULES[name]).main(options)


if __name__ == "__main__":
    with exit_on_error():
        main()
