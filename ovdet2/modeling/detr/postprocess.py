"""Post-processing: outputs of a decoder layer -> detections, without NMS.

Shapes: B images, N queries, K words, T detections. Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid.
"""

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ovdet2.errors import NumericalError
from ovdet2.modeling.detr.boxes import cxcywh_to_xyxy
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.vocabulary.bank import WordBank

_BLOCK = 64  # values per block of top_values


def top_values(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``values.topk(count)`` for rows of millions of values: the highest values of each row and their indices.

    The highest T values lie in the T blocks with the highest maxima. One pass computes the maxima; the top values are
    then selected from T blocks only.

    Args:
        values: Tensor [B, V], contiguous.
        count: T; at most V values are returned.

    Returns:
        (Tensor [B, T], Tensor [B, T] int64), highest first; the order of equal values is undefined.
    """
    rows, length = values.shape
    whole = length - length % _BLOCK
    blocks = values[:, :whole].unflatten(1, (-1, _BLOCK))
    best = blocks.amax(dim=2).topk(min(count, blocks.shape[1]), dim=1).indices  # B x T
    within = torch.arange(_BLOCK, device=values.device)
    places = (best[..., None] * _BLOCK + within).flatten(1)
    tail = torch.arange(whole, length, device=values.device).expand(rows, -1)
    places = torch.cat([places, tail], dim=1)
    top, order = values.gather(1, places).topk(min(count, length), dim=1)
    return top, places.gather(1, order)


def _without_negative(logits: Tensor, vocabulary: WordBank) -> Tensor:
    """Logits [B, N, words that can be detected], minus infinity for queries whose best word is a negative one."""
    detectable = logits[..., : vocabulary.num_detectable]
    return detectable.masked_fill(vocabulary.on_negative_words(logits)[..., None], -torch.inf)


class PostProcessor:
    """Every (query, word) pair is a candidate, scored by the sigmoid of its logit; the best ones are kept per image."""

    def __init__(self, detections_per_image: int = 100, score_threshold: float = 0.0) -> None:
        """
        Args:
            detections_per_image: maximum number of detections of an image.
            score_threshold: detections with a lower score are dropped; 0 keeps all.
        """
        self.detections_per_image = detections_per_image
        self.score_threshold = score_threshold

    @torch.no_grad()
    def __call__(
        self,
        outputs: DetrOutputs,
        sizes: Sequence[tuple[int, int]],
        layer: int = -1,
        vocabulary: WordBank | None = None,
    ) -> list[Instances]:
        """
        Args:
            outputs: decoder outputs; the scores are the sigmoid of the logits.
            sizes: B pairs (height, width) in pixels: the image size that the boxes are scaled to.
            layer: index of the decoder layer to use.
            vocabulary: the bank of the K words, if some of them may be negative: a query whose best word is a negative
                one has no detections, and no detection is of a negative word.

        Returns:
            list of B :class:`Instances`, best first, with ``pred_boxes`` (XYXY pixels, within the image), ``scores``
            (0 to 1, float32), ``pred_classes`` (0..K-1) and ``queries`` (0..N-1, the query of each detection).

        Raises:
            NumericalError: a score or box is not finite. (Compared with a threshold, NaN would drop the detection.)
        """
        logits, boxes = outputs.pred_logits[layer].float(), outputs.pred_boxes[layer].float()
        if vocabulary is not None and vocabulary.num_negative:
            logits = _without_negative(logits, vocabulary)
        words = logits.shape[2]
        top, places = top_values(logits.flatten(1), self.detections_per_image)  # B x T
        # A NaN or an infinity is among the highest logits; minus infinity marks queries on negative words.
        if top.isnan().any() or top.isposinf().any() or not torch.isfinite(boxes).all():
            raise NumericalError(
                "a detection has a score or box that is not finite: the training has diverged; use an earlier checkpoint."
            )
        scores, classes, queries = top.sigmoid(), places % words, places // words
        corners = cxcywh_to_xyxy(boxes).gather(1, queries[..., None].expand(-1, -1, 4))
        results = []
        for image, (height, width) in enumerate(sizes):
            kept = (scores[image] >= self.score_threshold) & (top[image] > -torch.inf)
            pixels = Boxes(corners[image, kept] * corners.new_tensor([width, height, width, height]))
            pixels.clip((height, width))
            results.append(
                Instances(
                    (height, width),
                    pred_boxes=pixels,
                    scores=scores[image, kept],
                    pred_classes=classes[image, kept],
                    queries=queries[image, kept],
                )
            )
        return results
