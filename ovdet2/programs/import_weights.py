"""``ovdet2 import-weights``: import published weights of a kind of detectors, each kind by its own program."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from ovdet2.errors import exit_on_error

# --kind: program
KINDS = {
    "deformable-detr": "ovdet2.programs.import_deformable_detr",
    "detic": "ovdet2.programs.import_detic",
    "detectron2": "ovdet2.programs.import_detectron2",
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the manifest that was written."""
    # The program of the kind parses everything else, and --help.
    parser = argparse.ArgumentParser(prog="ovdet2 import-weights", add_help=False, allow_abbrev=False)
    parser.add_argument("--kind", choices=list(KINDS), default="deformable-detr")
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    return importlib.import_module(KINDS[args.kind]).main(rest)


if __name__ == "__main__":
    with exit_on_error():
        main()
