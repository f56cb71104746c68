#!/usr/bin/env python
"""The same as ``ovdet2 import-weights``."""

from ovdet2.errors import exit_on_error
from ovdet2.programs.import_weights import main

if __name__ == "__main__":
    with exit_on_error():
        main()
