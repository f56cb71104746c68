"""The same as ``python -m ovdet2.ov_shapes.teachers``: train an embedded CLIP model on the captions of OV-Shapes."""

from ovdet2.errors import exit_on_error
from ovdet2.ov_shapes.teachers import main

if __name__ == "__main__":
    with exit_on_error():
        main()
