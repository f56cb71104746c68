"""Images of a report: ground truth and detections drawn by Detectron2's Visualizer, as JPEG data URIs."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.matching import LEFT_OUT, TRUE, Matches
from ovdet2.io.images import read_image
from ovdet2.report.labels import as_drawn, draw_labels, fonts_for

SIDE = 480  # longest side of a picture, pixels
# RGB in [0, 1], Okabe and Ito: novel orange, base sky blue, as in the report's style sheet on dark ground.
_COLOURS = {"novel": (0.90, 0.62, 0.0), "base": (0.34, 0.71, 0.91), "other": (0.80, 0.47, 0.65)}


def picture(path: str | Path, boxes_xyxy: np.ndarray, labels: Sequence[str], subsets: Sequence[str]) -> str:
    """An image with labelled boxes.

    Args:
        path: image file.
        boxes_xyxy: [N, 4], pixels of the image as :func:`~ovdet2.io.images.read_image` gives it.
        labels: N strings.
        subsets: N of "novel", "base", "other", for the colour.

    Returns:
        data URI of a JPEG, its longest side :data:`SIDE` pixels.

    Raises:
        DataError: the file is missing, damaged or too small.
    """
    image = read_image(path, "RGB")
    visualizer = Visualizer(image, scale=SIDE / max(image.shape[:2]))
    boxes, colours = np.asarray(boxes_xyxy, dtype=np.float64), [_COLOURS[subset] for subset in subsets]
    for box, colour in zip(boxes, colours):
        visualizer.draw_box(box, alpha=1, edge_color=colour)  # overlay_instances leaves them half transparent
    draw_labels(visualizer, boxes, labels, colours)
    pixels = visualizer.get_output().get_image()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


class Pictures:
    """Draws the images of one evaluation.

    Attributes:
        numbered: {"#3": word} of the words that were drawn as their category id, since no installed font has their
            characters.

    Args:
        truth: :class:`~ovdet2.evaluation.columns.Truth`, whose image records name the files.
        detections: :class:`~ovdet2.evaluation.columns.Detections`.
        split: :class:`~ovdet2.data.datasets.coco_json.Split`.
        matches: :class:`~ovdet2.evaluation.matching.Matches` of them.
    """

    def __init__(self, truth: Truth, detections: Detections, split: Split, matches: Matches) -> None:
        self.numbered: dict[str, str] = {}
        self._truth, self._detections, self._outcome = truth, detections, matches.outcome
        self._names = dict(zip(split.category_ids, split.names))
        self._subsets = dict(zip(split.category_ids, ("base" if is_base else "novel" for is_base in split.base_mask)))

    def file_name(self, image_id: int) -> str:
        """Name of an image's file, without its folder."""
        return Path(self._truth.images[image_id]["file_name"]).name

    def truth(self, image_id: int) -> str:
        """:func:`picture` of the ground truth of an image, crowds apart."""
        rows = (self._truth.image_ids == image_id) & ~self._truth.crowd
        ids = self._truth.category_ids[rows].tolist()
        return self._draw(image_id, self._truth.boxes_xyxy[rows], ids, [self._word(i) for i in ids])

    def detections(self, image_id: int, count: int) -> str:
        """:func:`picture` of the ``count`` best detections that count, those that are true marked."""
        found = self._detections
        rows = np.flatnonzero((found.image_ids == image_id) & (self._outcome != LEFT_OUT))
        rows = rows[np.argsort(-found.scores[rows], kind="stable")][:count]
        ids = found.category_ids[rows].tolist()
        labels = [
            f"{'✓' if outcome == TRUE else '✗'} {self._word(i)} {score:.2f}"
            for i, outcome, score in zip(ids, self._outcome[rows].tolist(), found.scores[rows].tolist())
        ]
        return self._draw(image_id, found.boxes_xyxy[rows], ids, labels)

    def _word(self, category_id):
        """A word as it is drawn."""
        name = self._names.get(category_id, f"category {category_id}")
        if fonts_for(name) is None:
            self.numbered[f"#{category_id}"] = name
        return as_drawn(name, category_id)

    def _draw(self, image_id, boxes, category_ids, labels):
        subsets = [self._subsets.get(category_id, "other") for category_id in category_ids]
        return picture(self._truth.images[image_id]["file_name"], boxes, labels, subsets)
