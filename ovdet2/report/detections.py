"""Pictures of detections, for people who look at single images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from PIL import Image

from ovdet2.io.files import atomic_path

_LEAST_SIDE = 640  # longer side of a picture, pixels: smaller ones would leave no room for the labels


def draw(image: np.ndarray, instances: Instances, names: Sequence[str]) -> np.ndarray:
    """An image with boxes, words and scores drawn by Detectron2's Visualizer, and with the prior word of each detection
    after "<-" for a detector with semantic priors.

    Args:
        image: array [H, W, 3] uint8 RGB.
        instances: detections on the CPU, in pixels of the image; with ``prior_words`` of a detector with semantic
            priors.
        names: words that ``pred_classes`` and ``prior_words`` index.

    Returns:
        array [h, w, 3] uint8 RGB, its longer side at least 640 pixels.
    """
    # A private Metadata object: the catalogue's entries can be written once only, vocabularies change.
    metadata = Metadata(name="detections", thing_classes=list(names))
    scale = max(1.0, _LEAST_SIDE / max(image.shape[:2]))
    visualizer = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    if not instances.has("prior_words"):
        return visualizer.draw_instance_predictions(instances).get_image()
    labels = [
        f"{names[word]} {score:.0%} <- {names[prior] if prior >= 0 else 'no prior'}"
        for word, score, prior in zip(
            instances.pred_classes.tolist(), instances.scores.tolist(), instances.prior_words.tolist()
        )
    ]
    return visualizer.overlay_instances(boxes=instances.pred_boxes, labels=labels).get_image()


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Write an RGB array [H, W, 3] uint8 as PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
