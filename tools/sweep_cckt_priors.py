r"""Evaluate one trained CCKT-Det under many priors (the paper's Table 6): files x thresholds rho x lengths L.

    python tools/sweep_cckt_priors.py --config-file configs/ovshapes/cckt_full_r18.yaml --rho 0.7,0.9 --top 6,12 \
        --priors output/priors/oracle.safetensors output/priors/clip.safetensors output/priors/random.safetensors \
        --output output/ovshapes/cckt_sweep MODEL.WEIGHTS output/ovshapes/cckt_full/model_final.pth

The rows are entries of ovdet2/methods/cckt/experiments.py.
"""

import sys

from ovdet2.errors import exit_on_error
from ovdet2.programs import experiments


def main(argv=None):
    """Command line."""
    return experiments.main(["cckt.priors", *(sys.argv[1:] if argv is None else argv)], "tools/sweep_cckt_priors.py")


if __name__ == "__main__":
    with exit_on_error():
        main()
