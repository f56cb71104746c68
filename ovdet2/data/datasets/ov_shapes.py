"""OV-Shapes (48 base, 17 novel classes): ov_shapes_train_base and ov_shapes_val_all, generated on first use.

Its classes carry the sparse category ids of OV-COCO, base on base and novel on novel, so that the code that maps ids is
the same and is tested without COCO.
"""

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.lvis_split import frequency_split
from ovdet2.data.datasets.register import data_root, register_dataset
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.data.shapes.classes import BASE_NAMES, NOVEL_NAMES, UNSEEN_COMBINATIONS, UNSEEN_NOUNS

_BASE = tuple(zip((category_id for category_id, _ in OV_COCO.base), BASE_NAMES, strict=True))
_NOVEL = tuple(zip((category_id for category_id, _ in OV_COCO.novel), NOVEL_NAMES, strict=True))

OV_SHAPES = Split(
    name="OV-Shapes 48/17",
    base=_BASE,
    novel=_NOVEL,
    groups={
        "unseen_nouns": tuple(category_id for category_id, name in _NOVEL if name in UNSEEN_NOUNS),
        "unseen_combinations": tuple(category_id for category_id, name in _NOVEL if name in UNSEEN_COMBINATIONS),
    },
)


def _prepare():
    from ovdet2.data.shapes.generate import ensure_current

    ensure_current(data_root())


for _name, _images, _base_only in (("train_base", "train2017", True), ("val_all", "val2017", False)):
    register_dataset(
        f"ov_shapes_{_name}",
        f"ov_shapes/annotations/ov_shapes_{_name}.json",
        f"ov_shapes/{_images}",
        OV_SHAPES,
        prepare=_prepare,
        base_only=_base_only,
        remedy="run python -m ovdet2.data.shapes",
    )

# The same images and truth in LVIS's form, with masks: rare classes are the novel ones.
for _name, _json, _base_only in (("train_base", "ov_lvis_train_base", True), ("val", "lvis_v1_val", False)):
    register_dataset(
        f"ov_shapes_lvis_{_name}",
        f"ov_shapes/annotations/{_json}.json",
        "ov_shapes",
        frequency_split,
        metric="ov_lvis",
        prepare=_prepare,
        base_only=_base_only,
        masks=True,
        remedy="run python -m ovdet2.data.shapes",
    )
