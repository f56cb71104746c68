"""Pictures of detections, for people who look at single images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ovdet2.io.files import atomic_path
from ovdet2.report.labels import as_drawn, draw_labels, word_colour

_MASK_ALPHA = 0.35
_LEAST_SIDE = 640  # longer side of a picture, pixels: smaller ones would leave no room for the labels


def draw(image: np.ndarray, instances: Instances, names: Sequence[str]) -> np.ndarray:
    """An image with the box, word and score of each detection, in one colour per word; with its mask, if it has one,
    and with its prior word after "<-" for a detector with semantic priors.

    A word that no installed font has the characters for is drawn as its number, see
    :func:`~ovdet2.report.labels.as_drawn`.

    Args:
        image: array [H, W, 3] uint8 RGB.
        instances: detections on the CPU, in pixels of the image, by descending score; with ``pred_masks``, bool
            Tensor [N, H, W], of a detector of masks, and ``prior_words`` of one with semantic priors.
        names: words that ``pred_classes`` and ``prior_words`` index.

    Returns:
        array [h, w, 3] uint8 RGB, its longer side at least 640 pixels.
    """
    visualizer = Visualizer(image, scale=max(1.0, _LEAST_SIDE / max(image.shape[:2])))
    boxes, words = instances.pred_boxes.tensor.numpy(), instances.pred_classes.tolist()
    labels = [f"{as_drawn(names[word], word)} {score:.0%}" for word, score in zip(words, instances.scores.tolist())]
    if instances.has("prior_words"):
        priors = [
            as_drawn(names[prior], prior) if prior >= 0 else "no prior" for prior in instances.prior_words.tolist()
        ]
        labels = [f"{label} <- {prior}" for label, prior in zip(labels, priors)]
    rgb = [word_colour(word) for word in words]
    if instances.has("pred_masks"):
        for mask, colour in zip(instances.pred_masks.numpy(), rgb):
            visualizer.draw_binary_mask(mask, colour, edge_color=colour, alpha=_MASK_ALPHA)
    for box, colour in zip(boxes, rgb):
        visualizer.draw_box(box, alpha=1.0, edge_color=colour)
    draw_labels(visualizer, boxes, labels, rgb)
    return visualizer.get_output().get_image()


def save_picture(path: Path, pixels: np.ndarray) -> None:
    """Write an RGB array [H, W, 3] uint8 as PNG, atomically."""
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
