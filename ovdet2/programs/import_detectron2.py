r"""Import a Faster or Mask R-CNN of Detectron2's model zoo (R-FPN, COCO), whose boxes CLIP classifies.

    ovdet2 import-weights --kind detectron2 --config-file coco/clip_on_crops_r50.yaml \
        --output faster.safetensors model_final_280758.pkl
    ovdet2 predict --config-file coco/clip_on_crops_r50.yaml --vocabulary "cat, red mug" --input photo.jpg --output out \
        MODEL.WEIGHTS faster.safetensors
    # without network: CLIP's weights from a file
    ovdet2 import-weights --kind detectron2 --config-file coco/clip_on_crops_r50.yaml \
        --output faster.safetensors model_final_280758.pkl MODEL.TEACHER.PRETRAINED ViT-B-32.pt

The output holds the weights and, as default words, the 80 classes of COCO, which CLIP embeds now. Its class layers stay: a
box is that of the class with the highest probability. Masks are not used: each is of one class. A file with other unknown,
missing or misshaped entries is refused.

Exit codes: 2 usage, 3 data, 4 CLIP's weights cannot be downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import META_ARCH_REGISTRY

import ovdet2.modeling  # noqa: F401  registers the architectures
from ovdet2.command_line import add_config_file, add_overrides, command_parser, keep_inputs
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.files import sha256_file, write_safetensors
from ovdet2.io.matching import matched_weights
from ovdet2.io.weights import read_weights
from ovdet2.modeling.build import build_teacher
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.word_lists import named_words

SCHEMA = "ovdet2/imported-detectron2/1"
_UNUSED = re.compile(
    r"roi_heads\.mask_head\..*|pixel_(mean|std)|proposal_generator\.anchor_generator\.cell_anchors\.\d"
)
_WORDS = ".vocabulary."  # in the names of the buffers of a word bank


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the manifest that was written."""
    parser = command_parser("import-weights --kind detectron2", __doc__)
    parser.add_argument("weights", help="file of the model zoo (.pkl)")
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    add_config_file(parser)
    add_overrides(parser)
    args = parser.parse_args(argv)
    if not args.output.endswith(".safetensors"):
        raise UsageError(f"--output {args.output}: name a .safetensors file.")
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    keep_inputs("--output", [args.output], args.weights, cfg)
    if cfg.MODEL.ROI_HEADS.NAME != "CropROIHeads":
        raise UsageError(
            f"--config-file {args.config_file} has not MODEL.ROI_HEADS.NAME CropROIHeads: see coco/clip_on_crops_r50.yaml."
        )
    weights = {name: torch.as_tensor(value) for name, value in read_weights(args.weights)["model"].items()}
    coco = named_words("coco")
    words = Vocabulary.build(
        coco.names, build_teacher(cfg), cfg.MODEL.VOCABULARY.TEMPLATES, [True] * len(coco.names), coco.category_ids
    )
    with torch.device("meta"):
        detector = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=words).state_dict()
    used = {name: (name, value) for name, value in weights.items() if not _UNUSED.fullmatch(name)}
    imported = matched_weights(used, {name: value for name, value in detector.items() if _WORDS not in name})
    imported |= {name: value for name, value in detector.items() if _WORDS in name}
    unused = sorted(weights.keys() - used.keys())
    manifest = {
        "schema": SCHEMA,
        "source_sha256": sha256_file(args.weights),
        "config": args.config_file,
        "unused": unused,
        "tensors": len(imported),
    }
    write_safetensors(args.output, imported, manifest)
    print(
        f"{args.output}: {len(imported)} tensors; not used: {len(unused)} entries of masks, anchors and pixel normalisation"
    )
    return manifest


if __name__ == "__main__":
    with exit_on_error():
        main()
