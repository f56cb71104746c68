"""The captions of COCO 2017, five per image: coco_captions_train and coco_captions_val."""

from ovdet2.data.datasets.register_readers import register_captions

for _part in ("train", "val"):
    register_captions(
        f"coco_captions_{_part}",
        f"coco/annotations/captions_{_part}2017.json",
        f"coco/{_part}2017",
        remedy=f"unpack {_part}2017.zip and annotations_trainval2017.zip of cocodataset.org there",
    )
