r"""Run the ablations of CLIP-DETR's Tables 4 to 8, and some of ours, on any of its configurations, and tabulate them.

    python tools/ablate_clip_detr.py --tables 4 5 6 7 8 --config-file configs/coco/clip_detr_r50_12ep.yaml \
        --output output/coco/ablations -- --num-gpus 8
    python tools/ablate_clip_detr.py --config-file configs/ovshapes/clip_detr_both_closed_r18.yaml --figure AP-base \
        --rows CLIP-DETR label label+box "rho 0.1" "0.5 x 5" --output output/ovshapes/ablations
    python tools/ablate_clip_detr.py ... --tabulate

The rows are entries of ovdet2/methods/clip_detr/experiments.py.
"""

import sys

from ovdet2.errors import exit_on_error
from ovdet2.programs import experiments


def main(argv=None):
    """Command line."""
    return experiments.main(
        ["clip_detr.ablations", *(sys.argv[1:] if argv is None else argv)], "tools/ablate_clip_detr.py"
    )


if __name__ == "__main__":
    with exit_on_error():
        main()
