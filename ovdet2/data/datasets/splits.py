"""The base / novel split of OV-COCO as constants, and the distractor words."""

from __future__ import annotations

from detectron2.config import CfgNode

from ovdet2.data.datasets.coco_json import Split

# Bansal et al., Zero-Shot Object Detection (ECCV 2018); ids are those of the official COCO annotations.
OV_COCO = Split(
    name="OV-COCO 48/17",
    base=(
        (1, "person"),
        (2, "bicycle"),
        (3, "car"),
        (4, "motorcycle"),
        (7, "train"),
        (8, "truck"),
        (9, "boat"),
        (15, "bench"),
        (16, "bird"),
        (19, "horse"),
        (20, "sheep"),
        (23, "bear"),
        (24, "zebra"),
        (25, "giraffe"),
        (27, "backpack"),
        (31, "handbag"),
        (33, "suitcase"),
        (34, "frisbee"),
        (35, "skis"),
        (38, "kite"),
        (42, "surfboard"),
        (44, "bottle"),
        (48, "fork"),
        (50, "spoon"),
        (51, "bowl"),
        (52, "banana"),
        (53, "apple"),
        (54, "sandwich"),
        (55, "orange"),
        (56, "broccoli"),
        (57, "carrot"),
        (59, "pizza"),
        (60, "donut"),
        (62, "chair"),
        (65, "bed"),
        (70, "toilet"),
        (72, "tv"),
        (73, "laptop"),
        (74, "mouse"),
        (75, "remote"),
        (78, "microwave"),
        (79, "oven"),
        (80, "toaster"),
        (82, "refrigerator"),
        (84, "book"),
        (85, "clock"),
        (86, "vase"),
        (90, "toothbrush"),
    ),
    novel=(
        (5, "airplane"),
        (6, "bus"),
        (17, "cat"),
        (18, "dog"),
        (21, "cow"),
        (22, "elephant"),
        (28, "umbrella"),
        (32, "tie"),
        (36, "snowboard"),
        (41, "skateboard"),
        (47, "cup"),
        (49, "knife"),
        (61, "cake"),
        (63, "couch"),
        (76, "keyboard"),
        (81, "sink"),
        (87, "scissors"),
    ),
)

# The 15 COCO classes that are neither trained nor tested in OV-COCO.
OV_COCO_UNUSED = (
    (10, "traffic light"),
    (11, "fire hydrant"),
    (13, "stop sign"),
    (14, "parking meter"),
    (37, "sports ball"),
    (39, "baseball bat"),
    (40, "baseball glove"),
    (43, "tennis racket"),
    (46, "wine glass"),
    (58, "hot dog"),
    (64, "potted plant"),
    (67, "dining table"),
    (77, "cell phone"),
    (88, "teddy bear"),
    (89, "hair drier"),
)


def distractors(cfg: CfgNode) -> tuple[str, ...]:
    """The words of TEST.DISTRACTORS; "coco_unused" stands for the 15 COCO classes that OV-COCO does not use."""
    words = []
    for word in cfg.TEST.DISTRACTORS:
        words.extend([name for _, name in OV_COCO_UNUSED] if word == "coco_unused" else [word])
    return tuple(words)
