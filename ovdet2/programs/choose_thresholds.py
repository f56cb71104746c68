r"""Choose a score threshold for each word on a validation set, and save them with the vocabulary.

    ovdet2 vocab thresholds output/ovshapes/vild/seed0/inference/ov_shapes_val_all \
        --weights output/ovshapes/vild/seed0/model_final.pth --output v.safetensors
    ovdet2 predict --config-file ovshapes-vild --vocabulary v.safetensors --input a.jpg --output out/
    # for a vocabulary file, which may hold further words; these have the general threshold
    ovdet2 vocab thresholds output/inference/ov_coco_val_all --vocabulary words.safetensors --output v.safetensors

FOLDER is the folder of an evaluation. The threshold of a word is the score with the best F1 at IoU 0.5. A word with fewer
than --min-objects objects, or without a correct detection, has the general threshold: the one with the best F1 over the
detections of all words together. Held-out test sets are refused. The thresholds belong to the evaluated detector.

Exit codes: 2 usage, 3 data.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ovdet2.command_line import add_config_file, command_parser, dataset_files, keep_inputs, options_but
from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import require_choice_allowed
from ovdet2.errors import DataError, UsageError, counted, exit_on_error
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.evaluation import REPORT, load_evaluation
from ovdet2.evaluation.matching import match
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.evaluation.word_thresholds import MIN_OBJECTS, WordThresholds, choose_thresholds
from ovdet2.predictor import saved_vocabulary
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.templates import clean_name


def main(argv: Sequence[str] | None = None) -> Vocabulary:
    """Command line; returns the vocabulary that was written."""
    args = parse_args(argv)
    load_config(args.config_file)  # registers its DATASETS.OWN
    keep_inputs("--output", [args.output], options_but(args, "output"), args.folder / REPORT, args.folder / MERGED)
    report = read_report(args.folder / REPORT)
    dataset = report["dataset"]
    require_choice_allowed(dataset, "the thresholds would be chosen on")
    keep_inputs("--output", [args.output], dataset_files(dataset))
    vocabulary = vocabulary_of(args)
    evaluation = load_evaluation(args.folder, dataset)
    split = split_of(dataset)
    assert split is not None  # load_evaluation requires one
    crowds = report["evaluator_type"] != "ov_voc"
    matches = match(evaluation.truth, evaluation.detections, crowds)
    chosen = choose_thresholds(evaluation.truth, evaluation.detections, split, matches, args.min_objects)
    vocabulary = with_thresholds(vocabulary, split, chosen)
    vocabulary.save(args.output)
    for line in summary(split, chosen):
        print(line)
    print(f"{args.output}: {counted(len(vocabulary), 'word')} with thresholds chosen on {dataset}")
    return vocabulary


def vocabulary_of(args: argparse.Namespace) -> Vocabulary:
    """The vocabulary of --vocabulary, or the one that the checkpoint of --weights holds.

    Raises:
        DataError: the file cannot be read, or holds no vocabulary.
    """
    if args.vocabulary:
        return Vocabulary.load(args.vocabulary)
    vocabulary = saved_vocabulary(args.weights)
    if vocabulary is None:
        raise DataError(f"{args.weights} is no checkpoint with a vocabulary: give --vocabulary.")
    return vocabulary


def with_thresholds(vocabulary: Vocabulary, split: Split, chosen: WordThresholds) -> Vocabulary:
    """The vocabulary with the threshold of each word by its name, and the general one for words outside of the split.

    Raises:
        UsageError: no word is in the split.
    """
    value_of = dict(zip(map(clean_name, split.names), chosen.values.tolist()))
    names = list(map(clean_name, vocabulary.names))
    if not value_of.keys() & set(names):
        raise UsageError(
            f"no word of the vocabulary is a class of {split.name}: give the vocabulary of the evaluation."
        )
    return replace(vocabulary, thresholds=tuple(value_of.get(name, chosen.general) for name in names))


def summary(split: Split, chosen: WordThresholds) -> list[str]:
    """How many words have a threshold, their range, and the mean F1 of novel and base words."""
    separate = f"{counted(int(chosen.chosen.sum()), 'word')} of {len(split.names)} with a separate one"
    lines = [f"general threshold {chosen.general:.4f}; {separate}"]
    if chosen.chosen.any():
        low, middle, high = np.quantile(chosen.values[chosen.chosen], (0, 0.5, 1))
        lines.append(f"separate thresholds from {low:.4f} to {high:.4f}, median {middle:.4f}")
    base = np.array(split.base_mask)
    for name, subset in (("novel", ~base), ("base", base)):
        present = subset & ~np.isnan(chosen.f1)
        if present.any():
            lines.append(
                f"mean F1 of {int(present.sum())} {name} words, on the set that chose the thresholds: "
                f"{100 * chosen.general_f1[present].mean():.2f} with the general one, {100 * chosen.f1[present].mean():.2f}"
            )
    return lines


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("vocab thresholds", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with report.json and predictions.jsonl")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vocabulary", help="vocabulary file of the evaluation; it may hold further words")
    source.add_argument("--weights", help="checkpoint of the evaluation, whose vocabulary is used")
    parser.add_argument(
        "--min-objects",
        type=int,
        default=MIN_OBJECTS,
        help=f"fewest objects of a word for a separate threshold ({MIN_OBJECTS})",
    )
    parser.add_argument("--output", required=True, help="vocabulary file to write (.safetensors)")
    add_config_file(parser, required=False, purpose="only for a data set in the DATASETS.OWN of the run's config.yaml")
    return parser.parse_args(argv)


if __name__ == "__main__":
    with exit_on_error():
        main()
