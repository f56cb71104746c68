r"""Evaluate the same weights with other names of the same classes, and report the loss of AP.

    # LVIS: the synonyms of the data set's annotation file
    ovdet2 synonyms --config-file ovlvis/vild_r50.yaml --names lvis --num-gpus 8 MODEL.WEIGHTS model_final.pth
    # OV-Shapes: four other names of each class come with ovdet2; this is the second one, "moon striped"
    ovdet2 synonyms --config-file ovshapes-vild --names ov_shapes --name 2 OUTPUT_DIR output/vild_synonyms
    # your own file: a class per line, "sofa; couch; settee"; the mean over all other names
    ovdet2 synonyms --config-file ovcoco/vild_r50.yaml --names words.txt --name mean MODEL.WEIGHTS model_final.pth

The evaluation with the class names is written to OUTPUT_DIR/inference, as by ovdet2 eval; if it is there already, with the
same weights and words, it is not run again. The one with other names is written to OUTPUT_DIR/synonyms, with
synonyms.json and other_names.safetensors. Classes without another name keep theirs and are not in the figures.
A name that is also the name of a class is not used.

Exit codes: 2 usage, 3 data, 4 environment, 5 a score that is not finite.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ovdet2.command_line import add_config_file, add_overrides, command_parser, keep_inputs
from ovdet2.config import load_config
from ovdet2.data.datasets.words import words_of_dataset
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.evaluation import REPORT
from ovdet2.evaluation.name_swap import name_swap, other_names, swap_lines
from ovdet2.io.files import sha256_file, write_json
from ovdet2.modeling.build import build_teacher, build_vocabulary
from ovdet2.programs import train
from ovdet2.vlm.fingerprint import require_same_teacher
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.templates import clean_name, template_set_names
from ovdet2.vocabulary.word_lists import other_names_of_ov_shapes, read_words

SCHEMA = "ovdet2/synonyms/1"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the content of synonyms.json.

    Raises:
        UsageError: not one test set, or no class has another name.
    """
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    if len(cfg.DATASETS.TEST) != 1:
        raise UsageError(f"DATASETS.TEST is {list(cfg.DATASETS.TEST)}: name one data set.")
    [dataset] = cfg.DATASETS.TEST
    output = Path(cfg.OUTPUT_DIR) / "synonyms"
    file = output / "other_names.safetensors"
    keep_inputs("OUTPUT_DIR", [file, output / "synonyms.json"], cfg.MODEL.VOCABULARY.FILE, args.names)
    names = words_of_dataset(dataset).names
    swapped = other_names(names, synonyms_of(args.names, dataset), args.name)
    if not swapped:
        raise UsageError(f"--names {args.names} has no other name (--name) of a class of {dataset}: give another one.")
    print(f"{len(swapped)} of {len(names)} classes of {dataset} have another name")
    vocabulary = build_vocabulary(cfg).pooled("mean")
    with_other_names(cfg, vocabulary, swapped).save(file)
    folders = [Path(folder) / "inference" / dataset for folder in (cfg.OUTPUT_DIR, output)]
    if not is_evaluation(folders[0], cfg, vocabulary, dataset):
        evaluate(args)
    evaluate(args, "MODEL.VOCABULARY.FILE", str(file), "OUTPUT_DIR", str(output))
    result = {"schema": SCHEMA, "dataset": dataset, "weights": cfg.MODEL.WEIGHTS, "names": args.names}
    result["name"] = "mean" if args.name is None else args.name
    result |= name_swap(read_report(folders[0] / REPORT), read_report(folders[1] / REPORT), swapped)
    write_json(output / "synonyms.json", result, indent=1)
    print("\n".join(swap_lines(result)))
    print(output / "synonyms.json")
    return result


def synonyms_of(source: str, dataset: str) -> Mapping[str, Sequence[str]]:
    """{cleaned class name: other names} of --names.

    Raises:
        UsageError: the data set's annotation file has no synonyms.
        DataError: the file cannot be read.
    """
    if source == "lvis":
        words = words_of_dataset(dataset, with_synonyms=True)
        if words.synonyms is None:
            raise UsageError(f"the annotation file of {dataset} has no synonyms: give a word list to --names.")
    else:
        words = other_names_of_ov_shapes() if source == "ov_shapes" else read_words(Path(source))
    return dict(zip(map(clean_name, words.names), words.synonyms or [()] * len(words.names)))


def with_other_names(cfg: CfgNode, vocabulary: Vocabulary, swapped: Mapping[str, Sequence[str]]) -> Vocabulary:
    """The vocabulary whose embeddings are those of other names; its names remain those of the classes.

    Args:
        cfg: configuration, with the teacher.
        vocabulary: of the class names.
        swapped: {class name: the other names, whose embeddings are averaged}.

    Raises:
        DataError: MODEL.TEACHER did not embed the class names.
    """
    teacher = build_teacher(cfg)
    require_same_teacher(vocabulary.teacher, "the vocabulary", teacher.fingerprint, "MODEL.TEACHER")
    named = vocabulary.templates in template_set_names()
    templates = vocabulary.templates if named else cfg.MODEL.VOCABULARY.TEMPLATES
    groups = list(swapped.values())
    embedded = Vocabulary.build(
        [first for first, *_ in groups], teacher, templates, synonyms=[others for _, *others in groups]
    )
    row_of = {name: row for row, name in enumerate(vocabulary.names)}
    embeddings = vocabulary.embeddings.clone()
    embeddings[torch.tensor([row_of[name] for name in swapped])] = embedded.embeddings
    used = tuple(tuple(swapped.get(name, (name,))) for name in vocabulary.names)
    return replace(vocabulary, embeddings=embeddings, synonyms=used)


def is_evaluation(folder: Path, cfg: CfgNode, vocabulary: Vocabulary, dataset: str) -> bool:
    """Whether a folder holds a finished evaluation of the configuration's weights with this vocabulary.

    Weights that changed after the evaluation are not those of the evaluation.
    """
    path, weights = folder / REPORT, Path(cfg.MODEL.WEIGHTS)
    if not path.is_file() or not weights.is_file() or weights.stat().st_mtime > path.stat().st_mtime:
        return False
    try:
        report = read_report(path)
    except DataError:
        return False
    stated, manifest = report.get("vocabulary") or {}, vocabulary.manifest()
    keys = ("templates", "templates_sha256", "names_sha256", "synonyms_sha256", "teacher")
    same = report["dataset"] == dataset and report.get("weights") == str(cfg.MODEL.WEIGHTS)
    same = same and all(stated.get(key) == manifest[key] for key in keys)
    return same and report.get("json_sha256") == sha256_file(MetadataCatalog.get(dataset).ov_files()[0])


def evaluate(args: argparse.Namespace, *overrides: str) -> None:
    """``ovdet2 eval`` with further overrides."""
    options = ["--config-file", args.config_file, "--num-gpus", str(args.num_gpus)]
    train.run([*options, *args.opts, *overrides], "eval")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("synonyms", __doc__)
    add_config_file(parser)
    parser.add_argument(
        "--names",
        required=True,
        help="'lvis' (the synonyms in the annotation file of the data set), 'ov_shapes', or a word list, .txt or .json, "
        "with a class and its other names per entry",
    )
    parser.add_argument(
        "--name", type=position, default=1, help="which of the other names: 1, 2, ..., or 'mean' of all (1)"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine")
    add_overrides(parser)
    return parser.parse_args(argv)


def position(text: str) -> int | None:
    """The type of --name: a position from 1 on, or None for the mean."""
    if text == "mean":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a position from 1 on nor 'mean'")
    return int(text)


if __name__ == "__main__":
    with exit_on_error():
        main()
