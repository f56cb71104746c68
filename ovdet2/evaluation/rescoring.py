"""Scores for boxes with words, from a CLIP: for models that name objects and give no confidence.

Shapes: R detections, K words, D embedding dimension. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation.columns import Detections
from ovdet2.io.images import read_image
from ovdet2.io.progress import progress_bar
from ovdet2.vlm.crops import embed_regions
from ovdet2.vlm.teacher import Teacher


def rescore(
    teacher: Teacher, words: Tensor, images: Mapping[int, Mapping[str, Any]], detections: Detections, split: Split
) -> np.ndarray:
    """The teacher's probability that a box shows its own word.

    The box is embedded as in a region cache (crops at 1x and 1.5x, ViLD's Eq. 1). The probability is the softmax of its cosines
    to all words at the teacher's temperature.

    Args:
        teacher: the CLIP.
        words: Tensor [K, D], unit rows, of the split's classes in its order.
        images: {image id: record with "file_name"}.
        detections: with classes of the split only, boxes in pixels of the image.
        split: the classes.

    Returns:
        [R] float32 in [0, 1].

    Raises:
        DataError: an image file that cannot be read.
    """
    scores = np.zeros(len(detections), dtype=np.float32)
    position = split.id_to_contiguous
    order = np.argsort(detections.image_ids, kind="stable")
    image_ids, starts = np.unique(detections.image_ids[order], return_index=True)
    parts = np.split(order, starts[1:]) if len(order) else []
    for image_id, rows in progress_bar(list(zip(image_ids.tolist(), parts)), desc="scoring boxes", unit="image"):
        pixels = torch.from_numpy(read_image(images[image_id]["file_name"], "RGB").copy()).permute(2, 0, 1)
        boxes_xyxy = torch.from_numpy(detections.boxes_xyxy[rows].copy())
        probs = teacher.classify(embed_regions(teacher, pixels, boxes_xyxy), words).cpu()
        own = torch.tensor([position[category_id] for category_id in detections.category_ids[rows].tolist()])
        scores[rows] = probs[torch.arange(len(rows)), own].numpy()
    return scores
