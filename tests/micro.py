"""A detector small enough to run in milliseconds, with weights that do not depend on a random generator.

5 words (3 base, 2 novel), 8 dimensions, images of about 64 x 96.
"""

import math
from functools import partial

import torch
from detectron2.modeling import build_backbone, build_proposal_generator
from detectron2.structures import Boxes, Instances
from safetensors.torch import load_file
from torch.nn import functional as F

from ovdet2.config import check_methods, find_config, get_cfg, methods_of
from ovdet2.modeling import OpenVocabularyRCNN, OpenVocabularyROIHeads
from ovdet2.modeling.host import Host
from ovdet2.modeling.part import build_parts
from ovdet2.modeling.rcnn.roi_heads import build_similar_box_head
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank

NAMES = ("red star", "blue moon", "striped ring", "dotted star", "plain heart")
TEMPERATURE = 0.2  # at 0.01 untrained scores are all 0 or 1, and tied
TEACHER = Fingerprint("micro", "test", "0" * 64)


def wave(shape, frequency=1.0):
    """A deterministic tensor in [-1, 1], the same in every library version."""
    count = math.prod(shape)
    return torch.sin(frequency * (1 + torch.arange(count, dtype=torch.float64)) ** 1.1).float().reshape(shape)


def vocabulary(names=NAMES, num_base=3, dim=8, teacher=TEACHER, frequency=0.7):
    """A vocabulary of made-up unit embeddings."""
    rows = F.normalize(wave((len(names), dim), frequency), dim=1)
    return Vocabulary(
        names, torch.arange(len(names)) < num_base, rows, teacher, "single", tuple(range(10, 10 + len(names)))
    )


def cfg():
    """ViLD's network at its smallest."""
    result = get_cfg()
    result.merge_from_file(str(find_config("base/ovshapes_r18.yaml")))
    result.MODEL.DEVICE = "cpu"
    result.MODEL.OVD.TEMPERATURE = TEMPERATURE
    result.MODEL.FPN.OUT_CHANNELS = 16
    result.MODEL.ROI_BOX_HEAD.CONV_DIM = 16
    result.MODEL.ROI_BOX_HEAD.NUM_CONV = 1
    result.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    result.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    result.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    # More than there are: nothing is sampled at random, so losses are a function of weights and images alone.
    result.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 1_000_000
    result.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 1_000_000
    result.MODEL.ROI_HEADS.POSITIVE_FRACTION = 1.0
    return result


def rcnn_parts(config, backbone, heads):
    """The parts of a configuration, as :meth:`OpenVocabularyRCNN.from_config` builds them."""
    box_head = partial(build_similar_box_head, config, backbone.output_shape())
    host = Host(heads.classifier.vocabulary, backbone, roi_heads=heads, build_box_head=box_head)
    return build_parts(config, methods_of(config), host)


def model(words=None, config=None, parts=()):
    """An OpenVocabularyRCNN with deterministic weights, in evaluation mode; ``parts`` follow those of the
    configuration."""
    config = config or cfg()
    check_methods(config)
    backbone = build_backbone(config)
    heads = OpenVocabularyROIHeads(config, backbone.output_shape(), WordBank(words or vocabulary()))
    network = OpenVocabularyRCNN(
        backbone=backbone,
        proposal_generator=build_proposal_generator(config, backbone.output_shape()),
        roi_heads=heads,
        parts=[*rcnn_parts(config, backbone, heads), *parts],
        proposals_kept=20,
        pixel_mean=config.MODEL.PIXEL_MEAN,
        pixel_std=config.MODEL.PIXEL_STD,
        input_format=config.INPUT.FORMAT,
    )
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            if parameter.ndim > 1:
                parameter.copy_(wave(parameter.shape, 0.3 + 0.01 * number) * (1.5 / parameter[0].numel() ** 0.5))
        if config.MODEL.OVD.CLS_LOSS == "softmax":
            heads.box_predictor.cls_score.background.copy_(wave((8,), 0.9))
    return network.eval()


def images(count=2):
    """Records as a mapper gives them, of different and non-square sizes, with base objects only."""
    records = []
    for index in range(count):
        height, width = (64, 96) if index % 2 == 0 else (80, 64)
        pixels = ((wave((3, height, width), 0.05 + 0.01 * index) + 1) * 127).to(torch.uint8)
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 20.0, 60.0, 60.0]]))
        target.gt_classes = torch.tensor([index % 3, (index + 1) % 3])
        records.append({"image": pixels, "height": height, "width": width, "image_id": index, "instances": target})
    return records


def golden_rcnn(network, losses):
    """Forward pass and gradients of a two-stage detector on two micro images, a dict of Tensors.

    Gradients, not the losses after a step: those depend on which proposals survive NMS, which the last digits decide.

    Args:
        network: the detector, in evaluation mode.
        losses: function of it and the records that gives its losses in training.
    """
    records = images(2)
    with torch.no_grad():
        found = network(records)
    values = {}
    for index, output in enumerate(found):
        values[f"scores.{index}"] = output["instances"].scores[:10]
        values[f"boxes.{index}"] = output["instances"].pred_boxes.tensor[:10]
    first = losses(network, records)
    values |= {f"step0.{name}": value.detach() for name, value in first.items()}
    sum(first.values()).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    values["gradient_norms"] = torch.stack([gradients[name].norm() for name in sorted(gradients)])
    values["gradient.projection"] = gradients["roi_heads.box_predictor.cls_score.projection.weight"]
    return {name: value.contiguous() for name, value in values.items()}


def assert_golden(path, found, gradient_atol):
    """Compare with stored tensors: within 1e-3 relative and 1e-4 absolute, gradients 1e-2 and ``gradient_atol``."""
    stored = load_file(str(path))
    assert set(stored) == set(found)
    for name, value in stored.items():
        rtol, atol = (1e-2, gradient_atol) if "gradient" in name else (1e-3, 1e-4)
        assert torch.allclose(found[name], value, rtol=rtol, atol=atol), (name, found[name], value)
