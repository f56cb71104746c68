"""Pictures of a query of a DETR: the sampling points of its last decoder layer, and the box after each layer.

Shapes: L decoder layers, H heads, M levels of attention, P points.
Names: ``pred_`` predicted, ``_xyxy`` boxes (left, top, right, bottom).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps

from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.report.labels import write_line

SIDE = 640  # longest side of one of the two pictures, pixels
_LEVELS = "cool"  # colour maps of matplotlib, first to last
_LAYERS = "viridis"
_DIMMED = 0.5
_LARGEST = 0.01  # radius of the point with the largest weight, as a share of the image's longer side


@dataclass(frozen=True)
class QueryView:
    """One query of one image; (x, y) in pixels of the original image, float32 on the CPU.

    Attributes:
        boxes_xyxy: Tensor [L, 4], the box that each decoder layer gives, within the image.
        reference: Tensor [2], the point that the last layer started from, or [4], the box, XYXY.
        points: Tensor [H, M, P, 2], sampling points of the last layer; outside of the image it reads zeros.
        weights: Tensor [H, M, P], attention weights of the points; their sum over levels and points is 1 for each head.
    """

    boxes_xyxy: torch.Tensor
    reference: torch.Tensor
    points: torch.Tensor
    weights: torch.Tensor


def to_pixels(
    locations: torch.Tensor, padded_size: Sequence[int], input_size: Sequence[int], size: Sequence[int]
) -> torch.Tensor:
    """Sampling locations in pixels of the original image.

    Args:
        locations: Tensor [..., 2], (x, y) in [0, 1] of the maps of the padded batch.
        padded_size: (height, width) of the batch, pixels.
        input_size: (height, width) of the image in it, which is at the upper left.
        size: (height, width) of the original image.

    Returns:
        Tensor [..., 2].
    """
    scale = [padded / given * wanted for padded, given, wanted in zip(padded_size, input_size, size)]
    return locations * locations.new_tensor(scale[::-1])


def query_view(
    outputs: DetrOutputs,
    image: int,
    query: int,
    padded_size: Sequence[int],
    input_size: Sequence[int],
    size: Sequence[int],
) -> QueryView:
    """Collect what is drawn of a query.

    Args:
        outputs: decoded with ``keep_sampling``.
        image: position in the batch.
        query: position among the queries.
        padded_size, input_size, size: as of :func:`to_pixels`.

    Raises:
        ValueError: the outputs were decoded without ``keep_sampling``.
    """
    if outputs.sampling_locations is None or outputs.sampling_weights is None:
        raise ValueError("the outputs have no sampling locations: decode with keep_sampling=True.")
    height, width = size
    boxes = Boxes(_in_image(outputs.pred_boxes[:, image, query], size))
    boxes.clip((height, width))
    locations = outputs.sampling_locations[-1, image, query].float().cpu()
    return QueryView(
        boxes.tensor,
        _in_image(outputs.references[-1][image, query], size),
        to_pixels(locations, padded_size, input_size, size),
        outputs.sampling_weights[-1, image, query].float().cpu(),
    )


def draw_query(view: QueryView, image: np.ndarray, text: str = "") -> np.ndarray:
    """Two pictures side by side: the last layer's reference and sampling points, and the box of each layer.

    A point's area and opacity go by its weight, its colour by its level. The first picture's reference is white.

    Args:
        view: :class:`QueryView`.
        image: array [H, W, 3] uint8 RGB, the original image, which is drawn darker.
        text: written on the second picture.

    Returns:
        array [h, w, 3] uint8 RGB, of which each picture is a half, its longer side :data:`SIDE`.
    """
    return np.concatenate([_draw_points(view, image), _draw_boxes(view, image, text)], axis=1)


def _in_image(normalised, size):
    """(cx, cy) or (cx, cy, w, h) in [0, 1] of the image without padding -> (x, y) or XYXY in pixels."""
    normalised = normalised.float().cpu()
    if normalised.shape[-1] == 4:
        normalised = cxcywh_to_xyxy(normalised)
    return normalised * normalised.new_tensor(size[::-1]).repeat(normalised.shape[-1] // 2)


def _draw_points(view, image):
    drawn = _canvas(image)
    largest = _LARGEST * max(image.shape[:2])
    colours = _colours(_LEVELS, view.points.shape[1])
    share = (view.weights / view.weights.max()).flatten()
    levels = torch.arange(len(colours))[:, None].expand_as(view.weights).flatten()
    for place in share.argsort().tolist():  # the largest weight on top
        part, colour = share[place].item(), colours[levels[place]]
        drawn.draw_circle(view.points.view(-1, 2)[place].tolist(), color=(*colour, part), radius=largest * part**0.5)
    if len(view.reference) == 4:
        drawn.draw_box(view.reference.tolist(), alpha=1, edge_color="w")
    else:
        x, y = view.reference.tolist()
        for dx, dy in ((largest, 0), (0, largest)):
            drawn.draw_line([x - dx, x + dx], [y - dy, y + dy], color="w", linewidth=1)
    return _finish(drawn, [f"level {number + 1}" for number in range(len(colours))], colours)


def _draw_boxes(view, image, text):
    drawn = _canvas(image)
    colours = _colours(_LAYERS, len(view.boxes_xyxy))
    for box, colour in zip(view.boxes_xyxy.tolist(), colours):
        drawn.draw_box(box, alpha=1, edge_color=colour)
    return _finish(drawn, [f"layer {number + 1}" for number in range(len(colours))], colours, text)


def _canvas(image):
    return Visualizer(image * _DIMMED, scale=SIDE / max(image.shape[:2]))


def _colours(name, count):
    """RGB in [0, 1] along a colour map, light enough for a dark ground."""
    return [colormaps[name](0.15 + 0.85 * i / max(1, count - 1))[:3] for i in range(count)]


def _finish(drawn, names, colours, text=""):
    """The picture with a legend of the colours at its left, and a text at its lower end."""
    line = 16 / drawn.output.scale
    for number, (name, colour) in enumerate(zip(names, colours)):
        write_line(drawn, name, (line / 4, line / 4 + number * line), colour)
    if text:
        write_line(drawn, text, (line / 4, drawn.output.height - 1.5 * line), "w")
    return drawn.get_output().get_image()
