#!/usr/bin/env python
"""Train and evaluate a detector: see ovdet2/programs/train.py, or --help."""

from ovdet2.errors import exit_on_error
from ovdet2.programs.train import main, parse_args, run

__all__ = ["main", "parse_args", "run"]

if __name__ == "__main__":
    with exit_on_error():
        run()
