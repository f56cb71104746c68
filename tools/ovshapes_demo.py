"""The same as ``ovdet2 demo``: train ViLD-text, ViLD and ViLD-ensemble on OV-Shapes and draw their detections."""

from ovdet2.errors import exit_on_error
from ovdet2.ov_shapes.demo import main

if __name__ == "__main__":
    with exit_on_error():
        main()
