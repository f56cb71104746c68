"""Recall of class-agnostic proposals.

Shapes: G ground-truth boxes, P proposals. Boxes are XYXY in pixels of the original image, arithmetic is float64.
Names: ``gt_`` ground truth.
"""

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


def pairwise_iou(boxes_a: np.ndarray, boxes_b: np.ndarray) -> np.ndarray:
    """IoU of every pair.

    Args:
        boxes_a: [A, 4] XYXY.
        boxes_b: [B, 4] XYXY.

    Returns:
        [A, B] float64 in [0, 1]; 0 where the union has no area.
    """
    a = np.asarray(boxes_a, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(boxes_b, dtype=np.float64).reshape(1, -1, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # A x B x 2
    intersection = sides.clip(min=0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def covered_iou(gt_boxes: np.ndarray, proposal_boxes: np.ndarray) -> np.ndarray:
    """How well one image's proposals cover each ground-truth box when a proposal may cover only one.

    Greedy: the pair of largest IoU is matched, both are removed, and so on (as in Detectron2's proposal evaluation).

    Args:
        gt_boxes: [G, 4].
        proposal_boxes: [P, 4], already cut to the number of proposals in question.

    Returns:
        [G] float64, the IoU of the proposal taken for each box; 0 where none was left or none overlaps.
    """
    overlaps = pairwise_iou(proposal_boxes, gt_boxes)  # P x G
    covered = np.zeros(overlaps.shape[1])
    for _ in range(min(overlaps.shape)):
        proposal, box = np.unravel_index(overlaps.argmax(), overlaps.shape)
        covered[box] = max(overlaps[proposal, box], 0.0)
        overlaps[proposal, :] = -1
        overlaps[:, box] = -1
    return covered


def average_recall(covered: np.ndarray) -> float:
    """Share of boxes covered, averaged over IoU 0.50:0.05:0.95.

    Args:
        covered: [G] values of :func:`covered_iou`, of all images together.

    Returns:
        Percent; nan without boxes. A box in an image without proposals counts as missed.
    """
    covered = np.asarray(covered, dtype=np.float64)
    if covered.size == 0:
        return float("nan")
    return 100.0 * float((covered[:, None] >= IOU_THRESHOLDS).mean())
