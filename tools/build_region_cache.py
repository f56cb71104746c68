"""Embed regions of every training image with the teacher, once: see ovdet2/programs/build_region_cache.py, or --help."""

from ovdet2.errors import exit_on_error
from ovdet2.programs.build_region_cache import main

if __name__ == "__main__":
    with exit_on_error():
        main()
