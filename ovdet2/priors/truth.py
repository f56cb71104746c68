"""The present and the verified absent classes of an image, from its annotations."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # types only: this package must not import ovdet2.data at run time
    from ovdet2.data.datasets.coco_json import Split


class Truth(NamedTuple):
    """Contiguous class ids of one image.

    Attributes:
        present: frozenset of the classes with an annotation; crowds count.
        absent: frozenset of the classes that are verified to be absent (LVIS's "neg_category_ids"); None if all other
            classes are absent, as in COCO.
    """

    present: frozenset
    absent: frozenset | None


def truth_of(records: Iterable[Mapping[str, Any]], split: "Split") -> dict[int, Truth]:
    """Dict of image id to :class:`Truth`.

    Args:
        records: Detectron2 records with contiguous category ids. In a training set of base classes, only base classes
            are present.
        split: the data set's :class:`~ovdet2.data.datasets.coco_json.Split`.
    """
    contiguous = split.id_to_contiguous
    result = {}
    for record in records:
        absent = record.get("neg_category_ids")
        if absent is not None:
            absent = frozenset(contiguous[category_id] for category_id in absent if category_id in contiguous)
        present = frozenset(annotation["category_id"] for annotation in record["annotations"])
        result[record["image_id"]] = Truth(present, absent)
    return result
