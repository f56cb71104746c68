"""The modules of a detector (host) that methods may use when they build a part for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ovdet2.vocabulary.bank import WordBank

if TYPE_CHECKING:
    from detectron2.modeling import Backbone

    from ovdet2.modeling.detr.model import DeformableDETR
    from ovdet2.modeling.rcnn.roi_heads import OpenVocabularyROIHeads


@dataclass(frozen=True)
class Host:
    """Modules of a detector that a method may use when it builds a part; they stay modules of the detector.

    Attributes:
        bank: :class:`WordBank` of the detector's words.
        backbone: Detectron2 Backbone.
        network: only of a DETR host: the :class:`~ovdet2.modeling.detr.model.DeformableDETR`; None elsewhere.
        roi_heads: only of an R-CNN host: the :class:`~ovdet2.modeling.rcnn.roi_heads.OpenVocabularyROIHeads`; None
            elsewhere.
        build_box_head: only of an R-CNN host: function that builds a second box head like the detector's, pooled
            features [R, C, S, S] -> [R, F]; None elsewhere.
    """

    bank: WordBank
    backbone: Backbone
    network: DeformableDETR | None = None
    roi_heads: OpenVocabularyROIHeads | None = None
    build_box_head: Callable[[], nn.Module] | None = None
