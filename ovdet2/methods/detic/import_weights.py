"""Detic's checkpoints, and those of CoDet and VLDet, by name and shape.

Most names are the same here. Each entry of a file is a weight of the detector, or one of :data:`UNUSED`; anything else is
refused, and so is a file that lacks a weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from ovdet2.errors import DataError
from ovdet2.io.matching import matched_weights

# (pattern of an official name, its name here)
_RENAMED = (
    (r"(roi_heads\.box_predictor\.(?:\d\.)?cls_score)\.linear\.(weight|bias)", r"\1.projection.\2"),
    (r"(backbone\.bottom_up)\.(patch_embed\..*)", r"\1.trunk.\2"),
    (r"(backbone\.bottom_up)\.(layers\.\d\.blocks\..*)", r"\1.trunk.\2"),
)
# Entries that detection does not need: (pattern, what they are).
UNUSED = (
    (r"backbone\.bottom_up\.base\.fc\.(weight|bias)", "classes of the trunk's pre-training"),
    (r"backbone\.bottom_up\.layers\.\d\.blocks\.\d+\.attn\.relative_position_index", "constants of the window size"),
    (r"roi_heads\.box_predictor\.(?:\d\.)?cls_score\.zs_weight", "text embeddings of the words of the training"),
    (r"roi_heads\.box_predictor\.(?:\d\.)?freq_weight", "image counts of the federated loss"),
    (r"roi_heads\.box_predictor\.(?:\d\.)?cls_score\.detection_weight", "embeddings for the losses of CoDet and VLDet"),
    (
        r"roi_heads\.box_predictor\.(?:\d\.)?(fc[12]|weight_transform\.\d)\.(weight|bias)",
        "weights of proposals in CoDet's loss",
    ),
    (r"roi_heads\.box_predictor\.(?:\d\.)?prop_score\..*", "scores of proposals in losses on image labels"),
    (r"(text_encoder|rn50_model)\..*", "the CLIP of the caption loss"),
    (r"freq_weight", "image counts of the sampled words"),
    (r"pixel_(mean|std)", "pixel normalisation, which the configuration gives"),
    (r".*\.num_batches_tracked", "step counts of batch norms"),
)


def import_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a published detector under their names here.

    Args:
        weights: official name to tensor.
        expected: state dict of the detector that they are for, without the buffers of its word bank.

    Returns:
        name to tensor, with the names of ``expected``.

    Raises:
        DataError: an entry is unknown, missing, or of another shape; the message names the first ones.
    """
    renamed = {ours: (name, value) for name, value in weights.items() if (ours := our_name(name)) is not None}
    return matched_weights(renamed, expected)


def unused_entries(weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """{what they are: names} of the entries that detection does not need."""
    unused: dict[str, list[str]] = {}
    for name in weights:
        for pattern, kind in UNUSED:
            if re.fullmatch(pattern, name):
                unused.setdefault(kind, []).append(name)
                break
    return unused


def trained_words(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """The embeddings of the detection's words that each stage of a published file has.

    CoDet and VLDet have two tables: "detection_weight" of the classes with boxes, and "zs_weight" of the words of
    captions. Detic has "zs_weight" only.

    Args:
        weights: official name to tensor.

    Returns:
        A unit Tensor [K, D] for each stage.

    Raises:
        DataError: there are none.
    """
    for table in ("detection_weight", "zs_weight"):
        names = [name for name in weights if name.endswith(f"cls_score.{table}")]
        if names:
            # The last column is that of the background, zero.
            return [F.normalize(weights[name].float()[:, :-1].T, dim=1) for name in names]
    raise DataError("the file has no text classifier (cls_score.zs_weight): it is of no detector of Detic.")


def our_name(name: str) -> str | None:
    """The name here of an official entry; None of one that detection does not need."""
    if any(re.fullmatch(pattern, name) for pattern, _ in UNUSED):
        return None
    # Official Swin: stage i ends with the merging of patches; timm's stage i + 1 begins with it.
    if merging := re.fullmatch(r"backbone\.bottom_up\.layers\.(\d)\.downsample\.(.*)", name):
        return f"backbone.bottom_up.trunk.layers.{int(merging[1]) + 1}.downsample.{merging[2]}"
    if norm := re.fullmatch(r"backbone\.bottom_up\.norm(\d)\.(weight|bias)", name):
        return f"backbone.bottom_up.norms.res{int(norm[1]) + 2}.{norm[2]}"
    for pattern, ours in _RENAMED:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return name
