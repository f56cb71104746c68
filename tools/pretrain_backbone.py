"""The same as ``python -m ovdet2.ov_shapes.trunk``: pre-train the ResNet-18 of the OV-Shapes detectors."""

from ovdet2.errors import exit_on_error
from ovdet2.ov_shapes.trunk import main

if __name__ == "__main__":
    with exit_on_error():
        main()
