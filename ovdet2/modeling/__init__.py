"""Models. Importing this package registers the meta-architectures and heads with Detectron2."""

from ovdet2.modeling.backbone import CLIPPyramid, CLIPResNet, CLIPViT, TimmSwin
from ovdet2.modeling.build import build_classifier, build_teacher, build_vocabulary, dataset_split
from ovdet2.modeling.meta_arch.frozen_vlm_rcnn import FrozenVLMRCNN
from ovdet2.modeling.meta_arch.open_vocabulary_deformable_detr import OpenVocabularyDeformableDETR
from ovdet2.modeling.meta_arch.open_vocabulary_rcnn import OpenVocabularyRCNN
from ovdet2.modeling.rcnn.box_head import NormalizedBoxHead
from ovdet2.modeling.rcnn.mask_head import NormalizedMaskHead
from ovdet2.modeling.rcnn.roi_heads import OpenVocabularyROIHeads
from ovdet2.modeling.rcnn.rpn import OpenVocabularyRPN
from ovdet2.modeling.rcnn.rpn_head import NormalizedRPNHead

__all__ = [
    "CLIPPyramid",
    "CLIPResNet",
    "CLIPViT",
    "FrozenVLMRCNN",
    "NormalizedBoxHead",
    "NormalizedMaskHead",
    "NormalizedRPNHead",
    "OpenVocabularyDeformableDETR",
    "OpenVocabularyRCNN",
    "OpenVocabularyROIHeads",
    "OpenVocabularyRPN",
    "TimmSwin",
    "build_classifier",
    "build_teacher",
    "build_vocabulary",
    "dataset_split",
]
