#!/usr/bin/env python
"""The same as ``ovdet2 dataset prepare ov-coco``."""

from ovdet2.errors import exit_on_error
from ovdet2.programs.prepare_ov_coco import main

if __name__ == "__main__":
    with exit_on_error():
        main()
