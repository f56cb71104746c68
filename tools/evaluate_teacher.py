"""Zero-shot classification of ground-truth boxes by a CLIP: see ovdet2/programs/evaluate_teacher.py, or --help."""

from ovdet2.errors import exit_on_error
from ovdet2.programs.evaluate_teacher import main

if __name__ == "__main__":
    with exit_on_error():
        main()
