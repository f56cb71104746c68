"""Train one of the two embedded CLIP models on the captions of OV-Shapes: see ovdet2/ov_shapes/teachers.py, or --help."""

from ovdet2.errors import exit_on_error
from ovdet2.ov_shapes.teachers import main

if __name__ == "__main__":
    with exit_on_error():
        main()
