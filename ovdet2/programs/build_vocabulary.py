r"""Build a vocabulary file: embed words with a CLIP text encoder, or import embeddings made elsewhere.

    # with the small CLIP that comes with ovdet2, which knows the words of OV-Shapes and needs no network
    ovdet2 vocab --words "moon; crescent, red star" --architecture ovshapes-resnet --pretrained embedded --output v.safetensors
    # your own words: a list; or a text file with a word per line and synonyms after semicolons ("sofa; couch; settee");
    # or a json {word: [synonyms]}
    ovdet2 vocab --words "cat, red mug" --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # your own prompt templates: a text file with a template per line ("a drawing of {article} {}.")
    ovdet2 vocab --words words.txt --templates prompts.txt \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # the classes of a registered data set, base classes first
    ovdet2 vocab --dataset ov_coco_val_all --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # the classes of a public data set by ascending id, here of LVIS with all synonyms averaged
    ovdet2 vocab --names lvis --synonyms --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # the score of a word is the maximum over its names, which keep their embeddings
    ovdet2 vocab --words "sofa; couch; settee, cat" --pooling max \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # an imported table with a row for each of COCO's 80 classes by id; its rows are reordered for --dataset
    ovdet2 vocab --dataset ov_coco_val_all --import-table table.npy --names coco \
        --architecture ViT-B-32 --pretrained openai --templates "a {name}" --output v.safetensors
    # an imported table with a column for each category of an annotation file, such as ViLD's
    ovdet2 vocab --json lvis_v1_val.json --import-table table.pt --key text --transpose \
        --architecture ViT-B-32 --pretrained openai --templates "as ViLD" --output v.safetensors

By default the embedding of a word uses its name only, as the tables of Detic and F-VLM do. --synonyms averages the
embeddings of all its names, as ViLD's published LVIS classifier does according to its file name. Synonyms in a word list
are averaged unless --no-synonyms is given. No two words may be the same text after cleaning ("red_mug", "Red mug"); if
an imported table has such rows, --first-of-duplicates keeps the first of each.

The number of prompts is printed before they are embedded. Then words are printed, each with a prompt and its nearest
words, and a warning lists near-duplicate pairs, which the teacher hardly distinguishes.

Exit codes: 2 usage, 3 data, 4 environment.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ovdet2.command_line import command_parser, dataset_files, keep_inputs, options_but
from ovdet2.data.datasets.words import words_of_dataset
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.neighbours import close_pairs, nearest_words
from ovdet2.vlm.tables import read_table
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import POOLINGS, Vocabulary, averaged_names, check_words, repeated_words
from ovdet2.vocabulary.templates import clean_name, get_templates, render
from ovdet2.vocabulary.word_lists import NAMED, WordList, named_words, read_words, words_of_json

CLOSE = 0.98  # cosine above which two words are a near-duplicate pair


def main(argv: Sequence[str] | None = None) -> Vocabulary:
    """Command line; returns the vocabulary that was written."""
    args = parse_args(argv)
    keep_inputs("--output", [args.output], options_but(args, "output"), dataset_files(args.dataset or ""))
    words = words_to_embed(args)
    if not args.first_of_duplicates:
        check_words(words.names)
    if args.import_table:
        vocabulary = import_table(args, words)
    else:
        print_prompts(args, words)  # reports a wrong template set before the teacher is loaded
        teacher = Teacher.load(args.architecture, args.pretrained, args.device)
        vocabulary = Vocabulary.build(
            words.names,
            teacher,
            args.templates,
            words.base_mask,
            words.category_ids,
            True,
            words.synonyms,
            args.pooling,
        )
    vocabulary.save(args.output)
    print_words(vocabulary, args.show, None if args.import_table else args.templates)
    warn_of_close_words(vocabulary)
    several = 0 if vocabulary.synonyms is None else sum(len(names) > 1 for names in vocabulary.synonyms)
    joined = f"{several} {'by the maximum' if vocabulary.pooling == 'max' else 'averaged'} over synonyms"
    print(
        f"{args.output}: {len(vocabulary)} words ({vocabulary.num_base} base, {joined}), "
        f"{vocabulary.embeddings.shape[1]} dimensions, teacher {vocabulary.teacher}, templates {vocabulary.templates}"
    )
    return vocabulary


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("vocab", __doc__)
    parser.add_argument("--words", help='"cat, red mug", a text file with a word per line, or a json of words')
    parser.add_argument("--dataset", help="registered data set with a base/novel split")
    parser.add_argument(
        "--json", help="COCO or LVIS json: its categories by id; with --dataset, the rows of --import-table"
    )
    parser.add_argument(
        "--names", choices=NAMED, help="classes of a public data set; with --dataset, the rows of --import-table"
    )
    parser.add_argument("--corrected", action="store_true", help="correct spelling mistakes in the classes of --names")
    parser.add_argument(
        "--synonyms",
        action=argparse.BooleanOptionalAction,
        help="average over synonyms; default: only over those in --words",
    )
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="a word's names: the mean of their embeddings, or the maximum of their scores (mean)",
    )
    parser.add_argument("--import-table", help=".npy, .pt or .pth file with raw embeddings [K, D]")
    parser.add_argument("--key", help="entry of a .pt file that holds several tensors")
    parser.add_argument("--transpose", action="store_true", help="the imported table is [D, K]")
    parser.add_argument(
        "--first-of-duplicates", action="store_true", help="of table rows with the same word, keep the first"
    )
    parser.add_argument("--architecture", required=True, help="open_clip architecture")
    parser.add_argument(
        "--pretrained",
        required=True,
        help="pretrained tag, 'embedded' or a weight file; recorded only, for --import-table",
    )
    parser.add_argument(
        "--templates",
        default="vild63",
        help="template set or file (vild63); for --import-table, a note on how its rows were made",
    )
    parser.add_argument("--show", type=show_count, default=20, help="number of words to print, or 'all' (20)")
    parser.add_argument("--device", default="cpu", help="device of the text encoder (cpu)")
    parser.add_argument("--output", required=True, help="vocabulary file to write (.safetensors)")
    args = parser.parse_args(argv)
    rows_described = bool(args.dataset and args.import_table and (args.json or args.names))
    sources = [args.words, args.dataset, args.json, args.names]
    if sum(map(bool, sources)) != 1 + rows_described:
        parser.error(
            "give one of --words, --dataset, --json, --names; with --dataset, --json or --names may describe the rows "
            "of --import-table"
        )
    if args.corrected and not args.names:
        parser.error("--corrected requires --names")
    if args.import_table and args.synonyms:
        parser.error("--synonyms embeds words: for an imported table, note in --templates how it was made")
    if args.import_table and args.pooling == "max":
        parser.error("--pooling max embeds each name: an imported table has one row for each word")
    if not args.import_table and (args.key or args.transpose):
        parser.error("--key and --transpose require --import-table")
    if args.first_of_duplicates and (args.dataset or not args.import_table):
        parser.error("--first-of-duplicates is for --import-table without --dataset, which selects rows by id")
    return args


def show_count(text: str) -> int | None:
    """The type of --show: a count, or None for all."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'")
    return int(text)


def words_to_embed(args: argparse.Namespace) -> WordList:
    """The words of the vocabulary; its synonyms are those to average over, or None.

    Raises:
        UsageError: --synonyms, but the source of the words has none.
    """
    if args.dataset:
        words = words_of_dataset(args.dataset, bool(args.synonyms))
    elif args.words:
        words = read_words(args.words)
    else:
        words = words_by_id(args)
    if args.synonyms and words.synonyms is None:
        raise UsageError("--synonyms was given, but the source of the words lists none: leave it out.")
    if args.synonyms or (args.synonyms is None and args.words and not args.import_table):
        return words
    return replace(words, synonyms=None)


def words_by_id(args: argparse.Namespace) -> WordList:
    """The words of --names or --json."""
    return named_words(args.names, args.corrected) if args.names else words_of_json(args.json)


def import_table(args: argparse.Namespace, words: WordList) -> Vocabulary:
    """A vocabulary from the rows of ``--import-table``, matched to ``words`` by category id.

    Raises:
        DataError: the table has another number of rows than words, or a word has no row.
    """
    described = words_by_id(args) if args.dataset and (args.json or args.names) else words
    source = args.json or args.names or args.dataset or "--words"
    table = read_table(args.import_table, args.key)
    if args.transpose:
        table = table.T
    count = len(described.names)
    if len(table) != count:
        turn = "leave --transpose out" if args.transpose else "give --transpose"
        remedy = turn if table.shape[1] == count else "give the words it was made for"
        raise DataError(
            f"{args.import_table} is {list(table.shape)}{' transposed' if args.transpose else ''}, but a row is needed "
            f"for each of the {count} words of {source}: {remedy}."
        )
    if described is not words:
        table = table[rows_by_id(words, described, source, args.dataset)]
    if args.first_of_duplicates:
        words, table = first_of_duplicates(words, table)
    teacher = Fingerprint.stated(args.architecture, args.pretrained)
    return Vocabulary.from_table(words.names, table, teacher, args.templates, words.base_mask, words.category_ids)


def rows_by_id(words: WordList, described: WordList, source: str, dataset: str) -> list[int]:
    """The row of each of ``words`` in a table whose rows ``described`` lists, by category id.

    Args:
        words: of the data set ``dataset``.
        described: K words, one for each row.
        source: of ``described``, for the message.
        dataset: name, for the message.

    Raises:
        DataError: a category is missing, or has another name: ids of one data set can be ids of another.
    """
    assert words.category_ids is not None and described.category_ids is not None  # of a data set and a json
    row_of = {category: row for row, category in enumerate(described.category_ids)}
    categories = list(zip(words.category_ids, words.names))
    missing = [
        (category, name)
        for category, name in categories
        if category not in row_of or clean_name(described.names[row_of[category]]) != clean_name(name)
    ]
    if missing:
        raise DataError(
            f"{source} has no category {missing[:5]} ({len(missing)} in all) of {dataset}: it is of another data "
            "set, or spells the names differently."
        )
    return [row_of[category] for category, _ in categories]


def first_of_duplicates(words: WordList, table: np.ndarray) -> tuple[WordList, np.ndarray]:
    """Drop words, and their rows, that clean to the same text as an earlier word; prints how many were dropped.

    Args:
        words: K words.
        table: [K, D].
    """
    dropped = [position for position, _ in repeated_words(words.names)]
    rows = sorted(set(range(len(words.names))) - set(dropped))
    shown = [repr(words.names[i]) for i in dropped[:5]] + ["..."] * (len(dropped) > 5)
    print(f"dropped {len(dropped)} rows whose word an earlier row has: {', '.join(shown) or 'none'}")
    ids = words.category_ids and tuple(words.category_ids[i] for i in rows)
    return replace(words, names=tuple(words.names[i] for i in rows), category_ids=ids), table[rows]


def print_prompts(args: argparse.Namespace, words: WordList) -> None:
    """Print the number of prompts to embed."""
    names = sum(map(len, averaged_names(words.names, words.synonyms)))
    templates = len(get_templates(args.templates))
    print(f"embedding {names} names in {templates} templates each: {names * templates} prompts")


def print_words(vocabulary: Vocabulary, count: int | None, templates: str | Path | None, neighbours: int = 3) -> None:
    """Print words, each with a prompt and its nearest words by cosine.

    Args:
        vocabulary: of K words.
        count: number of words to print, the first ones; None: all.
        templates: template set of the prompts; None: print the note of an imported table.
        neighbours: number of nearest words.
    """
    count = len(vocabulary) if count is None else min(count, len(vocabulary))
    cosines, nearest = nearest_words(vocabulary.embeddings, torch.arange(count), neighbours)
    for row in range(count):
        name = vocabulary.names[row]
        prompt = f'"{render(name, templates)[0]}"' if templates else vocabulary.templates
        pairs = zip(nearest[row].tolist(), cosines[row].tolist())
        near = ", ".join(f"{vocabulary.names[other]} {cosine:.2f}" for other, cosine in pairs)
        print(f"{name} -> {prompt} -> {near or 'no other word'}")
    if count < len(vocabulary):
        print(f"... and {len(vocabulary) - count} more words (--show all prints them)")


def warn_of_close_words(vocabulary: Vocabulary) -> None:
    """Print the near-duplicate pairs, whose embeddings have a cosine above ``CLOSE``, the closest first."""
    pairs, total = close_pairs(vocabulary.embeddings, CLOSE)
    if not total:
        return
    print(f"warning: {total} near-duplicate pairs, which the teacher hardly distinguishes (cosine above {CLOSE}):")
    for cosine, first, second in pairs:
        print(f"  {cosine:.4f}  {vocabulary.names[first]} | {vocabulary.names[second]}")
    if len(pairs) < total:
        print(f"  ... and {total - len(pairs)} more pairs")


if __name__ == "__main__":
    with exit_on_error():
        main()
