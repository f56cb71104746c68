"""The case of parity with Detic's Deformable DETR: its weights, and the stored detections of the oracle.

The picture is that of :mod:`tests.oracles.detic_cases`. ``python -m tests.oracles.deformable_detr_cases`` writes the
outputs again.
"""

import functools

from safetensors.torch import load_file, save_file

from tests.oracles import deformable_detr
from tests.oracles.detic_cases import GOLDEN, picture
from tests.oracles.formula import filled

CLASSES = 1203
SHORT_SIDE = 320  # the longer side, 427, is no multiple of a stride
# With these factors boxes have sides of 10 to 300 pixels, and float32 rounds them by at most 3e-4 pixels. The last bias
# puts the scores of the best 300 pairs between 0.4 and 0.9, 3e-6 or more apart, so that their order is certain.
_GAINS = {
    "conv3.norm.weight": 0.25,
    "sampling_offsets.weight": 0.5,
    "output_proj.weight": 0.5,
    "linear2.weight": 0.3,
    "layers.2.weight": 0.1,
    "class_embed.5.weight": 1.4,
    "class_embed.5.bias": -6.0,
}
_FILE = GOLDEN / "detic_deformable_detr.safetensors"


@functools.lru_cache(maxsize=1)
def weights():
    """A checkpoint of Detic's Deformable DETR, filled by formula. Do not change the dict: it is kept."""
    shapes = deformable_detr.weight_shapes(CLASSES)
    return deformable_detr.with_second_names(filled(shapes, _GAINS.items()))


def oracle():
    """The oracle's detections."""
    return deformable_detr.detect(picture(), weights(), SHORT_SIDE)


def golden():
    """The stored detections: boxes, scores and classes."""
    return load_file(_FILE)


if __name__ == "__main__":
    save_file(oracle(), _FILE)
