"""OV-LVIS (866 base, 337 novel classes): ov_lvis_train_base, ov_lvis_val and ov_lvis_minival, with masks.

The classes come from the json: frequent and common ones are base, rare ones novel.
"""

from ovdet2.data.datasets.lvis_split import frequency_split
from ovdet2.data.datasets.register import register_dataset

_REMEDY = "put LVIS v1 there as datasets/README.md shows, then run: ovdet2 dataset prepare ov-lvis"

for _name, _json, _base_only in (
    ("train_base", "ov_lvis_train_base", True),
    ("val", "lvis_v1_val", False),
    ("minival", "lvis_v1_minival", False),
):
    register_dataset(
        f"ov_lvis_{_name}",
        f"lvis/{_json}.json",
        "coco",
        frequency_split,
        metric="ov_lvis",
        base_only=_base_only,
        masks=True,
        remedy=_REMEDY,
    )
