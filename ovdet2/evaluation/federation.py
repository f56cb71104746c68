"""The federated rules of LVIS: on which images a class is evaluated.

LVIS does not annotate every class on every image. A class is evaluated on an image only where it is annotated or
verified to be absent, and where its annotation is not exhaustive a detection that matches nothing is ignored.
"""

from collections import defaultdict
from typing import Any

import numpy as np


class Federation:
    """The classes verified absent, or not annotated exhaustively, on each image of a data set.

    Args:
        images: {image id: record}, as of :class:`~ovdet2.evaluation.columns.Truth`, with "neg_category_ids" and
            "not_exhaustive_category_ids", dataset category ids.
    """

    def __init__(self, images: dict[int, dict[str, Any]]) -> None:
        self._negative, self._not_exhaustive = defaultdict(list), defaultdict(list)
        for image_id, record in images.items():
            for category_id in record["neg_category_ids"]:
                self._negative[category_id].append(image_id)
            for category_id in record["not_exhaustive_category_ids"]:
                self._not_exhaustive[category_id].append(image_id)

    def images_of(self, category_id: int, annotated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images that a class is evaluated on.

        Args:
            category_id: the class.
            annotated: ids of the images it is annotated on, in any order and number.

        Returns:
            (image ids it is evaluated on, image ids on which its annotation is not exhaustive), two int64 arrays.
        """
        negative = np.array(self._negative.get(category_id, ()), dtype=np.int64)
        not_exhaustive = np.array(self._not_exhaustive.get(category_id, ()), dtype=np.int64)
        return np.union1d(annotated, negative), not_exhaustive
