"""Evaluate a zero-shot detector of transformers with the evaluator of all detectors.

    ovdet2 zero-shot --model owlv2-base-patch16-ensemble/ --dataset ov_coco_val_all --output output/owlv2
    ovdet2 report compare output/ovcoco/vild_text_r50/inference/ov_coco_val_all output/owlv2

OWL-ViT, OWLv2, Grounding DINO, MM-Grounding-DINO and OmDet-Turbo: a folder of save_pretrained, or a name of the hub. The
predictions and report.json are written to --output. Long vocabularies take several forward passes for each image. Such a
detector may have been trained on boxes of the novel classes: "novel" is then only the name of these classes. State what its
training saw with --setting and --seen; otherwise the report has "unknown".

Exit codes: 2 usage, 3 data, 4 no transformers or no network.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from ovdet2.command_line import add_config_file, command_parser
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.evaluation.setting import add_setting_options, stated_setting
from ovdet2.zero_shot import ZeroShotDetector, evaluate


def main(argv: Sequence[str] | None = None) -> Mapping[str, Mapping[str, float]]:
    """Command line; returns the results."""
    args = parse_args(argv)
    setting = stated_setting(args.setting, args.seen)
    load_config(args.config_file)  # registers its DATASETS.OWN
    detector = ZeroShotDetector.load(
        args.model, args.device, template=args.template, words_per_pass=args.words_per_pass
    )
    return evaluate(detector, args.dataset, args.output, setting)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program.

    Raises:
        UsageError: --words-per-pass is below 1.
    """
    parser = command_parser("zero-shot", __doc__)
    parser.add_argument("--model", required=True, help="folder of a model and its processor, or a name of the hub")
    parser.add_argument("--dataset", required=True, help="registered open-vocabulary data set")
    parser.add_argument("--output", required=True, help="folder of predictions.jsonl and report.json")
    parser.add_argument("--template", help='prompt of a word, such as "a photo of a {}" (default: as published)')
    parser.add_argument("--words-per-pass", type=int, help="words of one forward pass (default: by the kind of model)")
    parser.add_argument("--device", default="cpu", help="device of the model (cpu)")
    add_setting_options(parser)
    add_config_file(parser, required=False, purpose="its DATASETS.OWN are registered")
    args = parser.parse_args(argv)
    if args.words_per_pass is not None and args.words_per_pass < 1:
        raise UsageError(f"--words-per-pass is {args.words_per_pass}: give at least 1.")
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
