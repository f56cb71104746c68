"""Class-wise NMS that is fast at score threshold 0 and with thousands of classes.

Shapes: R regions, K classes, M detections. Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

import torch
from detectron2.layers import batched_nms


def class_wise_nms(
    boxes_xyxy: torch.Tensor, scores: torch.Tensor, score_threshold: float, iou_threshold: float, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``topk`` highest-scoring detections after NMS within each class.

    Open-vocabulary detectors keep every score above 0, so R x K pairs are candidates: 1,000 regions and 1,203 words
    make 1.2 million. NMS suppresses a pair only by a pair of higher score. Therefore, if the C highest-scoring
    candidates leave at least ``topk`` detections, these are the first ``topk`` of NMS over all pairs. C grows until
    they do.

    Args:
        boxes_xyxy: Tensor [R, 4], one box per region for all classes.
        scores: Tensor [R, K] without background.
        score_threshold: pairs at or below it are dropped.
        iou_threshold: of NMS.
        topk: maximum number of detections; negative for all.

    Returns:
        (regions, classes): two long Tensors [M], by descending score.
    """
    flat = scores.flatten()
    total = int((flat > score_threshold).sum())
    count = total if topk < 0 else min(20 * topk, total)
    while True:
        candidates = flat.topk(count).indices
        regions, classes = candidates // scores.shape[1], candidates % scores.shape[1]
        keep = batched_nms(boxes_xyxy[regions].float(), flat[candidates], classes, iou_threshold)
        if count == total or len(keep) >= topk:
            keep = keep if topk < 0 else keep[:topk]
            return regions[keep], classes[keep]
        count = min(4 * count, total)
