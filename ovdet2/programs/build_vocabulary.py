r"""Build a vocabulary file: embed words, the classes of a data set or of a COCO json, or import an embedding table.

    # words of your own: a list, or a file (a word per line, synonyms after semicolons: "sofa; couch; settee";
    # or a json {word: [synonyms]}), with prompts of your own ("a drawing of {article} {}." a line)
    ovdet2 vocab --words "cat, red mug" \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    ovdet2 vocab --words words.txt --templates prompts.txt \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # the classes of a registered data set, base first
    ovdet2 vocab --dataset ov_coco_val_all \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # the classes of a public data set by name, by ascending id; of LVIS with all synonyms averaged
    ovdet2 vocab --names lvis --synonyms \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # a table made elsewhere, a row for each of COCO's 80 classes by id, reordered for --dataset
    ovdet2 vocab --dataset ov_coco_val_all --import-table table.npy --names coco \
        --architecture ViT-B-32 --pretrained openai --templates "a {name}" --output v.safetensors
    # likewise, the rows being those of the categories of an annotation file; ViLD's tables have a column per class
    ovdet2 vocab --json lvis_v1_val.json --import-table table.pt --key text --transpose \
        --architecture ViT-B-32 --pretrained openai --templates "as ViLD" --output v.safetensors

A word's embedding is that of its name alone, as in Detic's and F-VLM's tables; --synonyms averages those of all its
names, as ViLD's published LVIS classifier does by its file name. Synonyms written into a word list are averaged unless
--no-synonyms is given. No two words may be the same text after cleaning ("red_mug", "Red mug"); of a table with such
rows, --first-of-duplicates keeps the first of each. The tool prints the number of prompts before it embeds them, then
words with a prompt and the words nearest to them, and warns of pairs that the teacher can hardly tell apart.
"""

import argparse
from dataclasses import replace

import torch

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.words import words_of_dataset
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.neighbours import close_pairs, nearest_words
from ovdet2.vlm.tables import read_table
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary, averaged_names, check_words, repeated_words
from ovdet2.vocabulary.templates import clean_name, get_templates, render
from ovdet2.vocabulary.word_lists import NAMED, named_words, words_of_json, words_of_text

CLOSE = 0.98  # cosine


def main(argv=None):
    """Command line; returns the vocabulary written."""
    args = parse_args(argv)
    words = wanted_words(args)
    if not args.first_of_duplicates:
        check_words(words.names)
    if args.import_table:
        vocabulary = import_table(args, words)
    else:
        print_prompts(args, words)  # a wrong template set is seen before the teacher is loaded
        teacher = Teacher.load(args.architecture, args.pretrained, args.device)
        vocabulary = Vocabulary.build(
            words.names, teacher, args.templates, words.base_mask, words.category_ids, True, words.synonyms
        )
    vocabulary.save(args.output)
    print_words(vocabulary, args.show, None if args.import_table else args.templates)
    warn_of_close_words(vocabulary)
    averaged = 0 if vocabulary.synonyms is None else sum(len(names) > 1 for names in vocabulary.synonyms)
    print(
        f"{args.output}: {len(vocabulary)} words ({vocabulary.num_base} base, {averaged} averaged over synonyms), "
        f"{vocabulary.embeddings.shape[1]} dimensions, teacher {vocabulary.teacher}, templates {vocabulary.templates}"
    )
    return vocabulary


def parse_args(argv):
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
    parser.add_argument("--corrected", action="store_true", help="--names with its spelling mistakes mended")
    parser.add_argument(
        "--synonyms", action=argparse.BooleanOptionalAction, help="average synonyms; default: those of --words only"
    )
    parser.add_argument("--import-table", help=".npy, .pt or .pth file with raw embeddings [K, D]")
    parser.add_argument("--key", help="entry of a .pt file that holds several tensors")
    parser.add_argument("--transpose", action="store_true", help="the imported table is [D, K]")
    parser.add_argument(
        "--first-of-duplicates", action="store_true", help="of table rows with the same word, keep the first"
    )
    parser.add_argument("--architecture", required=True, help="open_clip architecture")
    parser.add_argument(
        "--pretrained", required=True, help="pretrained tag, 'embedded' or a weight file; stated for --import-table"
    )
    parser.add_argument(
        "--templates", default="vild63", help="template set or file; for --import-table, how the rows were prompted"
    )
    parser.add_argument("--show", type=show_count, default=20, help="words to print, a number or 'all'")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    rows_described = bool(args.dataset and args.import_table and (args.json or args.names))
    sources = [args.words, args.dataset, args.json, args.names]
    if sum(map(bool, sources)) != 1 + rows_described:
        parser.error(
            "give one of --words, --dataset, --json, --names; beside --dataset, --json or --names describes the rows "
            "of --import-table"
        )
    if args.corrected and not args.names:
        parser.error("--corrected is for --names")
    if args.import_table and args.synonyms:
        parser.error("--synonyms embeds words: say of an imported table in --templates how it was made")
    if not args.import_table and (args.key or args.transpose):
        parser.error("--key and --transpose are for --import-table")
    if args.first_of_duplicates and (args.dataset or not args.import_table):
        parser.error("--first-of-duplicates is for --import-table without --dataset, which chooses rows by id")
    return args


def show_count(text):
    """Type of --show: a count, or None for all."""
    if text == "all":
        return None
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'")
    return int(text)


def wanted_words(args):
    """The :class:`~ovdet2.vocabulary.word_lists.WordList` to write; its synonyms are those to average, or None."""
    if args.dataset:
        words = words_of_dataset(args.dataset, bool(args.synonyms))
    elif args.words:
        words = words_of_text(args.words)
    else:
        words = words_by_id(args)
    if args.synonyms and words.synonyms is None:
        raise UsageError("--synonyms was given, but the source of the words lists none: leave it out.")
    if args.synonyms or (args.synonyms is None and args.words and not args.import_table):
        return words
    return replace(words, synonyms=None)


def words_by_id(args):
    """The :class:`~ovdet2.vocabulary.word_lists.WordList` of --names or --json."""
    return named_words(args.names, args.corrected) if args.names else words_of_json(args.json)


def import_table(args, words):
    """A vocabulary from the rows of ``--import-table``, matched to the wanted classes by category id."""
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
        row_of = {category: row for row, category in enumerate(described.category_ids)}
        wanted = list(zip(words.category_ids, words.names))
        wrong = [
            (category, name)
            for category, name in wanted
            if category not in row_of or clean_name(described.names[row_of[category]]) != clean_name(name)
        ]
        if wrong:  # ids of one data set are ids of the next, with other meanings
            raise DataError(
                f"{source} has no category {wrong[:5]} ({len(wrong)} in all) of {args.dataset}: it is of another data "
                "set, or spelt otherwise."
            )
        table = table[[row_of[category] for category, _ in wanted]]
    if args.first_of_duplicates:
        words, table = first_of_duplicates(words, table)
    teacher = Fingerprint.stated(args.architecture, args.pretrained)
    return Vocabulary.from_table(words.names, table, teacher, args.templates, words.base_mask, words.category_ids)


def first_of_duplicates(words, table):
    """Words and rows without those whose word cleans to the same text as one before; prints how many were dropped."""
    dropped = [position for position, _ in repeated_words(words.names)]
    kept = sorted(set(range(len(words.names))) - set(dropped))
    shown = [repr(words.names[i]) for i in dropped[:5]] + ["..."] * (len(dropped) > 5)
    print(f"dropped {len(dropped)} rows whose word an earlier row has: {', '.join(shown) or 'none'}")
    ids = words.category_ids and tuple(words.category_ids[i] for i in kept)
    return replace(words, names=tuple(words.names[i] for i in kept), category_ids=ids), table[kept]


def print_prompts(args, words):
    """Print how many prompts are going to be embedded."""
    names = sum(map(len, averaged_names(words.names, words.synonyms)))
    templates = len(get_templates(args.templates))
    print(f"embedding {names} names in {templates} templates each: {names * templates} prompts")


def print_words(vocabulary, count, templates, neighbours=3):
    """Print the first ``count`` words (None: all), each with a prompt and the words nearest to it."""
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


def warn_of_close_words(vocabulary):
    """Print the pairs of words whose embeddings have a cosine above ``CLOSE``, the closest first."""
    pairs, total = close_pairs(vocabulary.embeddings, CLOSE)
    if not total:
        return
    print(f"warning: the teacher can hardly tell apart {total} pairs of words (cosine above {CLOSE}):")
    for cosine, first, second in pairs:
        print(f"  {cosine:.4f}  {vocabulary.names[first]} | {vocabulary.names[second]}")
    if len(pairs) < total:
        print(f"  ... and {total - len(pairs)} more pairs")


if __name__ == "__main__":
    with exit_on_error():
        main()
