r"""Import the weights of a published detector of Detic, CoDet or VLDet.

    # a vocabulary of the words that the published table of LVIS has, in its order
    ovdet2 vocab --names lvis --import-table lvis_v1_clip_a+cname.npy --architecture ViT-B-32-quickgelu \
        --pretrained openai --templates "a {name}" --output lvis.safetensors
    # the weights, with these words: the file's own embeddings of them are compared
    ovdet2 import-weights --kind detic --config-file ovlvis/detic_r50.yaml \
        Detic_LbaseI_CLIP_R5021k_640b64_4x_ft4x_max-size.pth --vocabulary lvis.safetensors --output detic.safetensors
    ovdet2 predict --config-file ovlvis/detic_r50.yaml --input photo.jpg --output out MODEL.WEIGHTS detic.safetensors

The configuration gives the network: a file with unknown, missing or misshaped entries is refused. Entries that only
training uses are listed. Without --vocabulary the output has no words: MODEL.VOCABULARY.FILE or DATASETS.TEST gives them.

Exit codes: 2 usage, 3 data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ovdet2.command_line import add_config_file, command_parser, keep_inputs
from ovdet2.config import load_config
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import sha256_file, write_safetensors
from ovdet2.io.weights import read_weights
from ovdet2.modeling.build import load_vocabulary
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary

SCHEMA = "ovdet2/imported-detic/1"
SAME_WORD = 0.99  # cosine of two embeddings of the same word; half precision is far above it
_WORDS = ".vocabulary."  # in the names of the buffers of a word bank


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the manifest that was written."""
    from ovdet2.methods.detic.import_weights import import_weights, trained_words, unused_entries
    from ovdet2.methods.detic.zoo_weights import skeleton

    parser = command_parser("import-weights --kind detic", __doc__)
    parser.add_argument("weights", help="published checkpoint (.pth)")
    parser.add_argument("--output", required=True, help="file to write (.safetensors)")
    parser.add_argument("--vocabulary", help="vocabulary file of the words that the weights were trained with")
    add_config_file(parser)
    args = parser.parse_args(argv)
    if not args.output.endswith(".safetensors"):
        raise UsageError(f"--output {args.output}: name a .safetensors file.")
    keep_inputs("--output", [args.output], args.weights, args.vocabulary)
    weights = {name: torch.as_tensor(value) for name, value in read_weights(args.weights)["model"].items()}
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu"])
    if not cfg.MODEL.ROI_HEADS.NAME.startswith("Detic"):
        raise UsageError(
            f"--config-file {args.config_file} is no configuration of Detic: see configs/ovlvis/detic_*.yaml."
        )
    tables = trained_words(weights)
    words = load_vocabulary(cfg, args.vocabulary) if args.vocabulary else None
    if words is not None:
        require_same_words(words, tables)
    detector = skeleton(cfg, words or _placeholder(tables))
    imported = import_weights(weights, {name: value for name, value in detector.items() if _WORDS not in name})
    if words is not None:
        imported |= {name: value for name, value in detector.items() if _WORDS in name}
    unused = unused_entries(weights)
    manifest = {
        "schema": SCHEMA,
        "source_sha256": sha256_file(args.weights),
        "config": args.config_file,
        "words": None if words is None else len(words),
        "unused": unused,
        "tensors": len(imported),
    }
    write_safetensors(args.output, imported, manifest)
    for kind, names in unused.items():
        print(f"not used: {len(names)} entries, {kind}, such as {names[0]}")
    print(f"{args.output}: {len(imported)} tensors, {len(words) if words else 'no'} words")
    return manifest


def require_same_words(words: Vocabulary, tables: Sequence[Tensor]) -> None:
    """Refuse a vocabulary that is not of the words that a file was trained with.

    Args:
        words: K words.
        tables: unit embeddings of each stage.

    Raises:
        DataError: another number of words or dimensions, or another embedding of a word.
    """
    for table in tables:
        if table.shape != words.embeddings.shape:
            raise DataError(
                f"the file was trained with {len(table)} words of {table.shape[1]} dimensions, but --vocabulary has "
                f"{len(words)} of {words.embeddings.shape[1]}: give the words of that training, in its order."
            )
        cosines = (table * words.embeddings).sum(dim=1)
        if bool((cosines < SAME_WORD).any()):
            worst = int(cosines.argmin())
            raise DataError(
                f"--vocabulary has another embedding of word {worst}, {words.names[worst]!r}, than the file (cosine "
                f"{cosines[worst]:.3f}): give the words of that training, in its order, or leave --vocabulary out."
            )


def _placeholder(tables: Sequence[Tensor]) -> Vocabulary:
    """One made-up word of the right dimension, to build the detector with."""
    row = F.normalize(torch.ones(1, tables[0].shape[1]), dim=1)
    return Vocabulary(("object",), torch.tensor([False]), row, Fingerprint("none", "none", None), "none")


if __name__ == "__main__":
    with exit_on_error():
        main()
