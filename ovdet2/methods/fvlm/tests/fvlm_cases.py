"""F-VLM detectors that run in milliseconds: a CLIP tower of either kind, with made-up weights, as the trunk."""

import torch
from detectron2.modeling import build_proposal_generator
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch.nn import functional as F

from ovdet2.config import check_methods, find_config, get_cfg
from ovdet2.modeling import FrozenVLMRCNN, OpenVocabularyROIHeads
from ovdet2.modeling.backbone.clip_pyramid import clip_pyramid
from ovdet2.vocabulary.bank import WordBank
from tests import micro

KINDS = ("resnet", "vit")
# The form of F-VLM's release, with batch norms that run on the CPU.
RELEASE = (
    *("MODEL.FPN.FORM", "output_norm", "MODEL.FPN.NORM", "BN", "MODEL.RPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.NORM", "BN"),
    *("MODEL.ROI_MASK_HEAD.NAME", "NormalizedMaskHead", "MODEL.ROI_MASK_HEAD.NORM", "BN", "MODEL.MASK_ON", True),
    *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"], "MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
)
FREE = ("MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.OVD.SECONDARY_SCORES", "none")  # a trained trunk


def set_weights(module):
    """Deterministic values for all parameters and statistics; those of norms are near what they scale."""
    with torch.no_grad():
        for number, (name, tensor) in enumerate(module.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            wave = micro.wave(tensor.shape, 0.3 + 0.01 * number) if tensor.ndim else torch.zeros(())
            if tensor.ndim > 1:
                tensor.copy_(wave * (1.5 / tensor[0].numel() ** 0.5))
            else:
                near = 1.0 if "var" in name or name.endswith("weight") else 0.0
                tensor.copy_(near + 0.2 * wave)


def tower(kind="resnet"):
    """A CLIP image tower of 8 dimensions: ResNet of native size 64 (pool grid 2x2), or ViT of patches of 12 pixels."""
    if kind == "resnet":
        visual = ModifiedResNet([1, 1, 1, 1], output_dim=8, heads=4, image_size=64, width=8)
    else:
        visual = VisionTransformer(48, 12, width=32, layers=5, heads=2, mlp_ratio=2.0, output_dim=8)
    set_weights(visual)
    return visual.eval()


def cfg(*overrides):
    """F-VLM's network at its smallest; nothing is sampled at random."""
    result = get_cfg()
    result.merge_from_file(str(find_config("ovshapes/fvlm_resnet.yaml")))
    result.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.OVD.TEMPERATURE", micro.TEMPERATURE, "MODEL.FVLM.TEMPERATURE", 0.3,
        "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FPN.NORM", "", "MODEL.ROI_BOX_HEAD.NORM", "",
        "MODEL.ROI_BOX_HEAD.CONV_DIM", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
        "MODEL.RPN.POST_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 50,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE", 1_000_000, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 1_000_000,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION", 1.0, *overrides,
    ])  # fmt: skip
    return result


def background():
    """The made-up embedding of "background"."""
    return F.normalize(micro.wave((8,), 0.9), dim=0)


def model(kind="resnet", overrides=(), words=None):
    """A FrozenVLMRCNN with deterministic weights, in evaluation mode."""
    config = cfg(*overrides)
    check_methods(config)
    backbone = clip_pyramid(config, tower(kind))
    shapes = backbone.output_shape()
    heads = OpenVocabularyROIHeads(config, shapes, WordBank(words or micro.vocabulary(), background()))
    network = FrozenVLMRCNN(
        backbone=backbone,
        proposal_generator=build_proposal_generator(config, shapes),
        roi_heads=heads,
        parts=micro.rcnn_parts(config, backbone, heads),
        proposals_kept=20,
        pixel_mean=config.MODEL.PIXEL_MEAN,
        pixel_std=config.MODEL.PIXEL_STD,
        input_format=config.INPUT.FORMAT,
    )
    with torch.no_grad():
        for number, (name, parameter) in enumerate(network.named_parameters()):
            if parameter.ndim > 1 and not name.startswith("backbone.trunk.visual"):
                parameter.copy_(micro.wave(parameter.shape, 0.3 + 0.01 * number) * (1.5 / parameter[0].numel() ** 0.5))
        heads.box_predictor.cls_score.log_scale.fill_(0.25)
    return network.eval()
