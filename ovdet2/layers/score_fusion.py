"""Fuse a detector's class probabilities with secondary scores of a vision-language model, for all methods.

Shapes: R regions, K classes. Names: ``_probs`` probabilities in [0, 1].
"""

import torch


def fusion_exponents(base_mask: torch.Tensor, base: float, novel: float) -> torch.Tensor:
    """Exponent of the secondary scores per class.

    Published settings (base, novel): ViLD-ensemble 1/3, 2/3; F-VLM on LVIS 0.35, 0.65; F-ViT on COCO 0.1, 0.8.

    Args:
        base_mask: Tensor [K] bool.
        base, novel: floats in [0, 1].

    Returns:
        Tensor [K] float32.
    """
    return torch.where(base_mask, float(base), float(novel))


def fuse_scores(
    detector_probs: torch.Tensor,
    secondary_probs: torch.Tensor,
    exponents: torch.Tensor | float,
    renormalize: bool = False,
) -> torch.Tensor:
    """Weighted geometric mean per class, ``p1^(1-e) * p2^e`` (ViLD Eq. 6; F-VLM's released code).

    The background column is the detector's. It only enters the renormalisation.

    Args:
        detector_probs: Tensor [R, K + 1], probabilities with background last.
        secondary_probs: Tensor [R, K] or [R, K + 1], secondary scores; a background column is ignored.
        exponents: e, Tensor [K] or float, in [0, 1]: 0 gives the detector's score, 1 the secondary score.
        renormalize: divide each row by its sum, background included (F-VLM).

    Returns:
        Tensor [R, K + 1] float32, background last.
    """
    k = detector_probs.shape[1] - 1
    first, second = detector_probs[:, :k].float(), secondary_probs[:, :k].float()
    exponents = torch.as_tensor(exponents, dtype=torch.float32, device=first.device)
    fused = torch.cat([first ** (1 - exponents) * second**exponents, detector_probs[:, k:].float()], dim=1)
    return fused / fused.sum(dim=1, keepdim=True).clamp(min=1e-12) if renormalize else fused
