r"""Build a vocabulary file: embed words, the classes of a data set or of a COCO json, or import an embedding table.

    # words of your own
    python tools/build_vocabulary.py --words "cat, red mug" \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # the classes of a registered data set, base first
    python tools/build_vocabulary.py --dataset ov_coco_val_all \
        --architecture ViT-B-32 --pretrained openai --output v.safetensors
    # a table made elsewhere, a row for each category of --json by id (here COCO's 80), reordered for --dataset
    python tools/build_vocabulary.py --dataset ov_coco_val_all --import-table table.npy --json instances_val2017.json \
        --architecture ViT-B-32 --pretrained openai --templates "a {name}" --output v.safetensors
"""

import argparse

import numpy as np

from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.files import read_json
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary, parse_words


def main(argv=None):
    """Command line; returns the vocabulary written."""
    args = parse_args(argv)
    names, base_mask, ids = wanted_classes(args)
    if args.import_table:
        vocabulary = import_table(args, names, base_mask, ids)
    else:
        teacher = Teacher.load(args.architecture, args.pretrained, args.device)
        vocabulary = Vocabulary.build(names, teacher, args.templates, base_mask, ids, progress=True)
    vocabulary.save(args.output)
    print(
        f"{args.output}: {len(vocabulary)} words ({vocabulary.num_base} base), "
        f"{vocabulary.embeddings.shape[1]} dimensions, teacher {vocabulary.teacher}, templates {vocabulary.templates}"
    )
    return vocabulary


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", help='"cat, red mug", or a text file with a word per line')
    parser.add_argument("--dataset", help="registered data set with a base/novel split")
    parser.add_argument(
        "--json", help="COCO or LVIS json: its categories by id; with --import-table, the rows of the table"
    )
    parser.add_argument("--import-table", help=".npy array [K, D] of raw embeddings")
    parser.add_argument("--architecture", required=True, help="open_clip architecture")
    parser.add_argument(
        "--pretrained", required=True, help="pretrained tag, 'embedded' or a weight file; stated for --import-table"
    )
    parser.add_argument(
        "--templates", default="vild63", help="template set; for --import-table, how the rows were prompted"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", required=True)
    args = parser.parse_args(argv)
    if bool(args.words) + bool(args.dataset) + bool(args.json and not args.dataset) != 1:
        parser.error("give one of --words, --dataset, --json (or --dataset with --import-table and --json)")
    if args.json and args.dataset and not args.import_table:
        parser.error("--json beside --dataset describes the rows of --import-table, which is missing")
    return args


def wanted_classes(args):
    """(names, base mask or None, category ids or None) of the vocabulary to write."""
    if args.words:
        return parse_words(args.words), None, None
    if args.dataset:
        from ovdet2.data.datasets import split_of

        split = split_of(args.dataset)
        if split is None:
            raise UsageError(f"{args.dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
        return split.names, split.base_mask, split.category_ids
    ids, names = categories_of(args.json)
    return names, None, ids


def categories_of(path):
    """(ids, names) of a COCO or LVIS json, by ascending id."""
    data = read_json(path)
    categories = data.get("categories") if isinstance(data, dict) else None
    if not categories or not all("id" in category and "name" in category for category in categories):
        raise DataError(f"{path} has no categories with id and name: give a COCO or LVIS annotation file.")
    ordered = sorted(categories, key=lambda category: category["id"])
    return [category["id"] for category in ordered], [category["name"] for category in ordered]


def import_table(args, names, base_mask, ids):
    """A vocabulary from the rows of ``--import-table``, matched to the wanted classes by category id."""
    try:
        table = np.load(args.import_table, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{args.import_table} is not a whole .npy table ({error}): export it again with numpy.save."
        ) from None
    if table.ndim != 2:
        raise DataError(f"{args.import_table} has shape {list(table.shape)}: a table has a row per word, [K, D].")
    if args.json:
        row_ids, _ = categories_of(args.json)
        if len(row_ids) != len(table):
            raise DataError(f"{args.import_table} has {len(table)} rows but {args.json} has {len(row_ids)} categories.")
        row_of = {category: row for row, category in enumerate(row_ids)}
        missing = [name for name, category in zip(names, ids) if category not in row_of]
        if missing:
            raise DataError(
                f"{args.json} has no category for {missing[:5]} ({len(missing)} in all): it is of another data set."
            )
        table = table[[row_of[category] for category in ids]]
    teacher = Fingerprint.stated(args.architecture, args.pretrained)
    return Vocabulary.from_table(names, table, teacher, args.templates, base_mask, ids)


if __name__ == "__main__":
    with exit_on_error():
        main()
