"""Generate OV-Shapes: python -m ovdet2.ov_shapes --root datasets"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.errors import exit_on_error


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Generate the OV-Shapes data set (2,500 images, under a minute).")
    parser.add_argument(
        "--root",
        default=os.environ.get("DETECTRON2_DATASETS", "datasets"),
        help="folder of all data sets; the images go to ROOT/ov_shapes (default: $DETECTRON2_DATASETS, else datasets)",
    )
    parser.add_argument("--seed", type=int, default=0, help="0 is the benchmark; others are for your own experiments")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that draw")
    args = parser.parse_args(arguments)
    print(json.dumps(ensure_generated(args.root, args.seed, workers=args.workers), indent=1))


if __name__ == "__main__":
    with exit_on_error():
        main()
