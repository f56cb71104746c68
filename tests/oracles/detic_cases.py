"""Cases of parity with Detic: a picture, weights, words, and the stored outputs of the oracle.

``python -m tests.oracles.detic_cases`` writes the outputs again.
"""

import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tests.oracles import detic, detic_c4
from tests.oracles.formula import filled, uniform

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SIZE = 480, 640  # height and width of the picture
# No multiple of 32 and no multiple of the picture's sides: the input is resized and padded, and Swin's maps too.
SHORT_SIDE = {"resnet18": 320, "resnet50": 400, "convnext_tiny": 400, "swin_base": 400, "coco_c4": 320}
WORDS, DETECTIONS = 20, 20
C4 = "coco_c4"  # the detector of OV-COCO; the others are named by their trunks
# Fewer proposals than published, for time; the many detections are of several words.
C4_PROPOSALS, C4_DETECTIONS = 40, 100
# With these factors maps have values of about 1 to 10, and boxes sides of 10 to 500 pixels.
_GAINS = {
    "centernet_head.bbox_pred.bias": 3.0,
    "bbox_pred.2.weight": 0.3,
    **{f"fpn_lateral{level}.weight": 0.4 for level in (3, 4, 5)},
    **{f"fpn_output{level}.weight": 0.6 for level in (3, 4, 5)},
}
# Larger factors of the deltas would turn the rounding of float32, which differs between processors, into 1e-3 pixels.
C4_GAINS = {
    "conv3.norm.weight": 0.3, "stem.conv1.weight": 0.02, "anchor_deltas.weight": 0.03, "bbox_pred.2.weight": 0.1
}  # fmt: skip
_LAST_NORM = {"resnet18": {"bn2.weight": 0.4}, "resnet50": {"bn3.weight": 0.25}}


def picture():
    """JPEG bytes of a picture in which the three colours and the four corners differ."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    waves = [128 + 100 * np.sin(x / 37 + y / 91), 128 + 100 * np.cos(y / 23) * np.sin(x / 50), x * y // 97 % 256]
    pixels = np.stack(waves, axis=-1).clip(0, 255).astype(np.uint8)
    pixels[100:300, 200:420] = 200, 30, 30
    pixels[250:400, 50:150] = 20, 220, 60
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@functools.lru_cache(maxsize=1)
def weights(trunk):
    """A checkpoint of a published detector, filled by formula. Do not change the dict: it is kept."""
    if trunk == C4:
        return filled(detic_c4.weight_shapes(WORDS), C4_GAINS.items())
    return filled(detic.weight_shapes(trunk, WORDS), gains(trunk))


def gains(trunk):
    """The factors of :func:`weights`, as of :func:`~tests.oracles.formula.filled`."""
    return [*_GAINS.items(), *_LAST_NORM.get(trunk, {}).items()]


def text():
    """Unit embeddings of the words, Tensor [20, 512]."""
    return F.normalize(2 * uniform("text", (WORDS, 512)).float() - 1, dim=1)


def oracle(trunk):
    """The oracle's detections; of C4 there are no masks."""
    if trunk == C4:
        given = picture(), weights(C4), text(), SHORT_SIDE[C4]
        return detic_c4.detect(*given, num_proposals=C4_PROPOSALS, topk=C4_DETECTIONS)
    return detic.detect(picture(), weights(trunk), trunk, text(), SHORT_SIDE[trunk], topk=DETECTIONS)


def golden(trunk):
    """The stored detections: boxes, scores, classes, and masks, bool [M, height, width]; of C4 there are no masks."""
    stored = load_file(GOLDEN / f"detic_{trunk}.safetensors")
    if "mask_changes" not in stored:
        return stored
    count = len(stored["boxes"])
    flips = torch.zeros(count * SIZE[0] * SIZE[1], dtype=torch.int64)
    flips[stored.pop("mask_changes").long()] = 1
    return stored | {"masks": (flips.cumsum(0) % 2 == 1).view(count, *SIZE)}


def write(trunk):
    """Store the oracle's detections; masks as the places where their values change, in order."""
    found = oracle(trunk)
    if "masks" not in found:
        save_file(found, GOLDEN / f"detic_{trunk}.safetensors")
        return
    flat = found.pop("masks").flatten()
    changes = torch.nonzero(torch.cat([flat[:1], flat[1:] ^ flat[:-1]])).flatten().int()
    save_file({**found, "mask_changes": changes}, GOLDEN / f"detic_{trunk}.safetensors")


if __name__ == "__main__":
    for name in (*detic.TRUNKS, C4):
        write(name)
