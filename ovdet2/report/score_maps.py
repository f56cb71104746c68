"""Norms of the features of a DETR's encoder: discriminative scores (CLIP-DETR, appendix A.1; Co-DETR draws the same).

Shapes: L levels, h x w map, H x W image. Names: ``pred_`` predicted.
"""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from torch.nn import functional as F

from ovdet2.modeling.detr.memory import Memory
from ovdet2.report.labels import as_drawn, draw_labels, word_colour, write_line

SIDE = 480  # longest side of each picture, pixels
_MAP = colormaps["turbo"]
_OPACITY = 0.6


def discriminative_scores(memory: Memory, image: int) -> list[torch.Tensor]:
    """The l2 norm of the encoder's features at every place of an image.

    Args:
        memory: :class:`~ovdet2.modeling.detr.memory.Memory`.
        image: position in the batch.

    Returns:
        list of L Tensor [h, w], the parts of the maps that are no padding; float32.
    """
    maps = []
    for features, ratios in zip(memory.levels(), memory.valid_ratios[image].tolist()):
        columns, rows = (round(part * size) for part, size in zip(ratios, features.shape[:1:-1]))
        maps.append(features[image, :, :rows, :columns].float().norm(dim=0))
    return maps


def joint_scores(maps: Sequence[torch.Tensor], size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of all levels over the image: each scaled to 0..1 and resized bilinearly; then their mean, scaled again.

    Args:
        maps: of :func:`discriminative_scores`.
        size: (height, width) wanted.

    Returns:
        (Tensor [H, W], Tensor [L, H, W]): the mean and the levels, each 0 to 1, 0 everywhere where a map is constant.
    """
    levels = torch.stack(
        [F.interpolate(_scaled(of_level)[None, None], size=size, mode="bilinear")[0, 0] for of_level in maps]
    )
    return _scaled(levels.mean(dim=0)), levels


def draw_scores(image: np.ndarray, scores: torch.Tensor, threshold: float = 0.5, text: str = "") -> np.ndarray:
    """An image in grey with its scores in colour on top.

    Args:
        image: array [H, W, 3] uint8 RGB.
        scores: Tensor [H, W], 0 to 1.
        threshold: places below it are left grey (the paper's figure omits those below 0.5).
        text: written on the picture.

    Returns:
        array [h, w, 3] uint8 RGB, its longer side :data:`SIDE`.
    """
    values = scores.cpu().numpy()
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    coloured = (1 - _OPACITY) * grey + _OPACITY * 255 * _MAP(values)[..., :3]
    return _finish(np.where(values[..., None] >= threshold, coloured, grey), text)


def draw_detections(image: np.ndarray, instances: Instances, names: Sequence[str], text: str = "") -> np.ndarray:
    """An image with boxes, words and scores.

    Args:
        image: array [H, W, 3] uint8 RGB.
        instances: :class:`Instances` on the CPU, in pixels of the image.
        names: words that ``pred_classes`` index.
        text: written on the picture.

    Returns:
        array [h, w, 3] uint8 RGB, its longer side :data:`SIDE`.
    """
    words, boxes = instances.pred_classes.tolist(), instances.pred_boxes.tensor.numpy()
    labels = [f"{as_drawn(names[word], word)} {score:.2f}" for word, score in zip(words, instances.scores)]
    drawn, rgb = Visualizer(image, scale=SIDE / max(image.shape[:2])), [word_colour(word) for word in words]
    for box, colour in zip(boxes, rgb):
        drawn.draw_box(box, alpha=1.0, edge_color=colour)
    draw_labels(drawn, boxes, labels, rgb)
    return _titled(drawn, text)


def _scaled(values):
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def _finish(pixels, text):
    return _titled(Visualizer(pixels, scale=SIDE / max(pixels.shape[:2])), text)


def _titled(drawn, text):
    if text:
        write_line(drawn, text, (4 / drawn.output.scale,) * 2, "w")
    return drawn.get_output().get_image()
