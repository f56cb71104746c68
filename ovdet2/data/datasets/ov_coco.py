"""OV-COCO (48 base, 17 novel classes): ov_coco_train_base and ov_coco_val_all."""

from ovdet2.data.datasets.register import register_dataset
from ovdet2.data.datasets.splits import OV_COCO

_REMEDY = "put COCO 2017 there as datasets/README.md shows, then run: ovdet2 dataset prepare ov-coco"

for _name, _images, _base_only in (("train_base", "train2017", True), ("val_all", "val2017", False)):
    register_dataset(
        f"ov_coco_{_name}",
        f"coco/annotations/ov_coco_{_name}.json",
        f"coco/{_images}",
        OV_COCO,
        base_only=_base_only,
        remedy=_REMEDY,
    )
