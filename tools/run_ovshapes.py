"""Run rows of the OV-Shapes benchmark and write their table.

    python tools/run_ovshapes.py --rows vild_text closed_set --seeds 0 1 2      # train, evaluate, tabulate
    python tools/run_ovshapes.py --rows all --seeds 0 1 2 --table docs/RESULTS.md
    python tools/run_ovshapes.py --demo                                         # what `make demo` does

The rows are entries of ovdet2/ov_shapes/rows.py; the runner is ovdet2/programs/experiments.py.
"""

import sys

from ovdet2.errors import exit_on_error
from ovdet2.ov_shapes import demo
from ovdet2.programs import experiments


def main(argv=None):
    """Command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--demo" in argv:
        return demo.main([word for word in argv if word != "--demo"])
    return experiments.main(["ovdet2.ov_shapes.rows:PLAN", *argv], "tools/run_ovshapes.py")


if __name__ == "__main__":
    with exit_on_error():
        main()
