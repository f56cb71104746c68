#!/usr/bin/env python
"""The same as ``ovdet2 experiment ov-shapes``; with --demo, the same as ``ovdet2 demo``."""

import sys

from ovdet2.errors import exit_on_error
from ovdet2.ov_shapes import demo
from ovdet2.programs import experiments


def main(argv=None):
    """Command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--demo" in argv:
        return demo.main([word for word in argv if word != "--demo"])
    return experiments.main(["ov-shapes", *argv])


if __name__ == "__main__":
    with exit_on_error():
        main()
