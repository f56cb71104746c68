"""Detectors of Detic for tests."""

import io

import numpy as np
import torch
from detectron2.data import transforms as T
from PIL import Image

from ovdet2.config import load_config
from ovdet2.data.samples import Sample
from ovdet2.methods.detic.import_weights import import_weights
from ovdet2.modeling import OpenVocabularyRCNN
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary
from tests.oracles import detic_cases
from tests.oracles.formula import filled, uniform

TEACHER = Fingerprint("micro", "test", "0" * 64)
TIMM_NAMES = {"swin_base": "swin_base_patch4_window7_224"}


def words(rows):
    """A vocabulary of made-up words with given unit embeddings."""
    names = tuple(f"word {number}" for number in range(len(rows)))
    return Vocabulary(names, torch.ones(len(rows), dtype=torch.bool), rows, TEACHER, "detic")


def config(*overrides):
    """The base configuration, on the CPU."""
    return load_config("base/detic.yaml", ["MODEL.DEVICE", "cpu", *overrides])


def own_weights(detector):
    """The state dict without the words."""
    return {name: value for name, value in detector.state_dict().items() if ".vocabulary." not in name}


def published(trunk):
    """A detector with the weights of a case of parity, imported."""
    if trunk == detic_cases.C4:
        few = ["MODEL.RPN.POST_NMS_TOPK_TEST", detic_cases.C4_PROPOSALS, "TEST.DETECTIONS_PER_IMAGE",
               detic_cases.C4_DETECTIONS]  # fmt: skip
        cfg = load_config("ovcoco/detic_r50.yaml", ["MODEL.DEVICE", "cpu", *few])
    else:
        name = TIMM_NAMES.get(trunk, trunk)
        cfg = config("MODEL.DETIC.TRUNK", name, "TEST.DETECTIONS_PER_IMAGE", detic_cases.DETECTIONS)
    detector = OpenVocabularyRCNN(cfg, vocabulary=words(detic_cases.text())).eval()
    imported = import_weights(detic_cases.weights(trunk), own_weights(detector))
    assert not detector.load_state_dict(imported, strict=False).unexpected_keys
    return detector


def sample_of(jpeg, short_side, colours="RGB"):
    """JPEG bytes as a dataloader gives them, resized; ``colours`` is INPUT.FORMAT."""
    pixels = np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))
    pixels = pixels if colours == "RGB" else np.ascontiguousarray(pixels[:, :, ::-1])
    resized = T.ResizeShortestEdge([short_side] * 2, 1333).get_transform(pixels).apply_image(pixels)
    image = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
    return Sample(image=image, height=pixels.shape[0], width=pixels.shape[1])


@torch.no_grad()
def detect(detector, jpeg, short_side):
    """Detections of JPEG bytes."""
    return detector([sample_of(jpeg, short_side, detector.input_format)])[0]["instances"]


def micro(*overrides, rows=None):
    """A narrow R18 detector with weights by formula, in evaluation mode, for images of 64 x 96."""
    narrow = ["MODEL.DETIC.TRUNK", "resnet18", "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
              "MODEL.ROI_MASK_HEAD.CONV_DIM", 16]  # fmt: skip
    rows = torch.nn.functional.normalize(2 * uniform("rows", (5, 8)).float() - 1, dim=1) if rows is None else rows
    detector = OpenVocabularyRCNN(config(*narrow, *overrides), vocabulary=words(rows)).eval()
    shapes = {name: value.shape for name, value in own_weights(detector).items()}
    detector.load_state_dict(filled(shapes, detic_cases.gains("resnet18")), strict=False)
    return detector


def images(count):
    """Samples of 64 x 96 pixels."""
    pixels = (255 * uniform("pixels", (count, 3, 64, 96))).float()
    return [Sample(image=image, height=64, width=96) for image in pixels]
