#!/usr/bin/env python
"""The same as ``ovdet2 experiment cckt.priors``."""

import sys

from ovdet2.errors import exit_on_error
from ovdet2.programs import experiments


def main(argv=None):
    """Command line."""
    return experiments.main(["cckt.priors", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    with exit_on_error():
        main()
