#!/usr/bin/env python
"""The same as ``ovdet2 doctor --install-detectron2``."""

import sys

try:
    from ovdet2.errors import exit_on_error
    from ovdet2.programs.install_detectron2 import main
except ImportError:
    sys.exit("ovdet2 is not installed in this Python. Run `pip install -e .` in the project folder first.")

if __name__ == "__main__":
    with exit_on_error():
        main()
