"""Transfer targets: transfer_coco_2017_val, transfer_objects365_v1_val and transfer_voc_2007_test.

They test a detector that was trained on another data set with their classes. All classes of their split are novel. With
a checkpoint loaded, score fusion treats the classes that it was trained on as base. The prefix distinguishes them from
the data sets that Detectron2 registers.
"""

from functools import partial

from ovdet2.data.datasets.register import all_novel, register_dataset

for _name, _json, _images, _title, _metric, _remedy in (
    (
        "coco_2017_val",
        "coco/annotations/instances_val2017.json",
        "coco/val2017",
        "COCO 2017, 80 classes",
        "ov_coco",
        "unpack val2017.zip and annotations_trainval2017.zip of cocodataset.org there",
    ),
    (
        "objects365_v1_val",
        "objects365/objects365_val.json",
        "objects365/val",
        "Objects365 v1, 365 classes",
        "ov_coco",
        "put objects365_val.json and the validation images of Objects365 v1 there (datasets/README.md)",
    ),
    (
        "voc_2007_test",
        "VOC2007/voc_2007_test.json",
        "VOC2007/JPEGImages",
        "PASCAL VOC 2007, 20 classes",
        "ov_voc",
        "unpack VOCtest_06-Nov-2007.tar there, then run: ovdet2 dataset prepare voc",
    ),
):
    register_dataset(f"transfer_{_name}", _json, _images, partial(all_novel, _title), metric=_metric, remedy=_remedy)
