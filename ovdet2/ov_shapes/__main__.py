"""Generate the OV-Shapes data set (2,000 training and 500 validation images, about a minute).

    ovdet2 dataset prepare ov-shapes --root datasets
    # the 1,000 test images as well, which are otherwise drawn on the first use of ov_shapes_test
    ovdet2 dataset prepare ov-shapes --root datasets --test

``python -m ovdet2.ov_shapes --root datasets`` does the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.ov_shapes import ensure_generated, ensure_test
from ovdet2.errors import exit_on_error


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("dataset prepare ov-shapes", __doc__)
    parser.add_argument(
        "--root",
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="folder of all data sets; the images go to ROOT/ov_shapes (default: $DETECTRON2_DATASETS or datasets)",
    )
    parser.add_argument("--seed", type=int, default=0, help="0 is the benchmark (0)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that draw images")
    parser.add_argument("--test", action="store_true", help="draw the test split as well, 1,000 images")
    args = parser.parse_args(arguments)
    print(json.dumps(ensure_generated(args.root, args.seed, workers=args.workers), indent=1))
    if args.test:
        print(json.dumps(ensure_test(args.root, workers=args.workers), indent=1))


if __name__ == "__main__":
    with exit_on_error():
        main()
