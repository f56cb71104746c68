r"""Train and evaluate CCKT-Det with several teachers (the paper's Table 5), one after another.

    python tools/sweep_cckt_teachers.py --config-file configs/ovshapes/cckt_full_r18.yaml \
        --teachers ovshapes-resnet:embedded ovshapes-vit:embedded --output output/ovshapes/cckt_teachers

The rows are entries of ovdet2/methods/cckt/experiments.py.
"""

import sys

from ovdet2.errors import exit_on_error
from ovdet2.programs import experiments


def main(argv=None):
    """Command line."""
    return experiments.main(
        ["cckt.teachers", *(sys.argv[1:] if argv is None else argv)], "tools/sweep_cckt_teachers.py"
    )


if __name__ == "__main__":
    with exit_on_error():
        main()
