"""LVIS v1 as a closed set, its 1,203 classes all base: closed_lvis_v1_train, closed_lvis_v1_val and _minival.

The report has AP of the rare, common and frequent classes. There is no novel class. Masks are not loaded.
"""

from ovdet2.data.datasets.lvis_split import closed_set_split
from ovdet2.data.datasets.register import register_dataset

for _part in ("train", "val", "minival"):
    register_dataset(
        f"closed_lvis_v1_{_part}",
        f"lvis/lvis_v1_{_part}.json",
        "coco",
        closed_set_split,
        metric="ov_lvis",
        base_only=True,
        remedy="put LVIS v1 there as datasets/README.md shows",
    )
