"""What a host tells the methods that build a part for it."""

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
    """The built pieces of a detector that parts may read when they are built; nothing here is owned by a part.

    Attributes:
        bank: :class:`WordBank` of the detector's words.
        backbone: Detectron2 Backbone.
        network: of a DETR host, the :class:`~ovdet2.modeling.detr.model.DeformableDETR`; None elsewhere.
        roi_heads: of an R-CNN host, the :class:`~ovdet2.modeling.rcnn.roi_heads.OpenVocabularyROIHeads`; None
            elsewhere.
        build_box_head: of an R-CNN host, a function that builds another box head like the detector's, pooled features
            [R, C, S, S] -> [R, F]; None elsewhere.
    """

    bank: WordBank
    backbone: Backbone
    network: DeformableDETR | None = None
    roi_heads: OpenVocabularyROIHeads | None = None
    build_box_head: Callable[[], nn.Module] | None = None
