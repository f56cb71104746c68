"""COCO 2017 as a closed set, its 80 classes all base: closed_coco_2017_train and closed_coco_2017_val.

They serve to reproduce the published results of a closed-set detector. There is no novel class.
"""

from functools import partial

from ovdet2.data.datasets.register import all_base, register_dataset

for _part in ("train", "val"):
    register_dataset(
        f"closed_coco_2017_{_part}",
        f"coco/annotations/instances_{_part}2017.json",
        f"coco/{_part}2017",
        partial(all_base, "COCO 2017, 80 classes, closed set"),
        base_only=True,
        remedy=f"unpack {_part}2017.zip and annotations_trainval2017.zip of cocodataset.org there",
    )
