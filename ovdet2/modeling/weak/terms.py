"""Terms that several methods build from the keys of :mod:`ovdet2.config.text_keys`."""

from __future__ import annotations

from detectron2.config import CfgNode

from ovdet2.layers import CosineClassifier
from ovdet2.modeling.host import Host
from ovdet2.modeling.weak.caption_queue import CaptionQueue
from ovdet2.modeling.weak.part import Term
from ovdet2.modeling.weak.region_word import CaptionLoss, TextLogits
from ovdet2.modeling.weak.samplers import WholeImage


def text_classifier_of(host: Host) -> CosineClassifier:
    """The text classifier of an R-CNN host."""
    assert host.roi_heads is not None, "the methods that build terms support only R-CNN hosts"
    return host.roi_heads.text_classifier


def own_bias_of(keys: CfgNode) -> float | None:
    """Initial value of a loss's own bias; None: it has none."""
    return keys.BIAS if keys.OWN_BIAS else None


def caption_term(keys: CfgNode, host: Host) -> Term:
    """Each image against the captions of the step and of a queue (Detic); keys of ``add_text_keys``."""
    queue = CaptionQueue(keys.QUEUE, host.bank.embeddings.shape[1])
    loss = CaptionLoss(TextLogits(text_classifier_of(host), own_bias_of(keys)), queue, keys.NEGATIVE_WEIGHT)
    return Term(keys.CAPTION_WEIGHT, WholeImage(), loss)
