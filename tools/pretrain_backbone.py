"""Pre-train the ResNet-18 of the OV-Shapes detectors: see ovdet2/ov_shapes/trunk.py, or --help."""

from ovdet2.errors import exit_on_error
from ovdet2.ov_shapes.trunk import main

if __name__ == "__main__":
    with exit_on_error():
        main()
