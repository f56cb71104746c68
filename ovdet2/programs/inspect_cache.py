r"""Print what a region cache contains and draw some of its regions with their nearest words.

    # a cache of annotated boxes: also measures its zero-shot accuracy
    ovdet2 cache inspect output/ovcoco/annotation_cache --output output/inspect
    # other words than the base words of the data set
    ovdet2 cache inspect output/ovcoco/region_cache --words "cat, umbrella, red mug" --output output/inspect

Prints the facts of the manifest and the number of boxes per image. Of a cache of annotated boxes it measures the
zero-shot accuracy over the base words: it falls to chance if images, prompts or weights are wrong. For some images it
prints the nearest words of regions and draws their crops, as the teacher saw them, into <output>/regions.png.

Exit codes: 2 usage, 3 data, 4 environment.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image, ImageDraw, ImageFont

from ovdet2.caches.region_cache import RegionCache
from ovdet2.command_line import command_parser, keep_inputs, options_but
from ovdet2.data.datasets import split_of
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.images import read_image
from ovdet2.io.progress import progress_bar
from ovdet2.report.labels import font_file
from ovdet2.vlm.crops import boxes_to_cut, crop_regions
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary, read_words
from ovdet2.vocabulary.templates import clean_name

PICTURE = "regions.png"
_PER_IMAGE = 6  # most regions of an image that are printed and drawn
Records = Mapping[int, Mapping[str, Any]]  # image id: record of Detectron2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns {"regions": int, "accuracy": percent or None}."""
    args = parse_args(argv)
    picture = args.output / PICTURE
    keep_inputs("--output", [picture], options_but(args, "output"))
    cache = RegionCache(args.cache)
    recipe = cache.manifest["recipe"]
    print_contents(cache)
    teacher, vocabulary = words_of(args, cache)
    records = records_of(cache)
    keep_inputs("--output", [picture], (record["file_name"] for record in records.values()))
    annotated = recipe["boxes"]["source"] == "annotations"
    accuracy = zero_shot_accuracy(cache, records, vocabulary) if annotated else None
    draw_nearest(args, cache, records, teacher, vocabulary)
    return {"regions": cache.manifest["regions"], "accuracy": accuracy}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program.

    Raises:
        UsageError: --images is below 1.
    """
    parser, device = command_parser("cache inspect", __doc__), "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("cache", help="folder of the cache")
    parser.add_argument("--words", help='"cat, red mug" or a text file; default: the base words of the data set')
    parser.add_argument("--vocabulary", help="vocabulary file of ovdet2 vocab, instead of --words")
    parser.add_argument("--templates", default="vild63", help="prompt template set of the words (vild63)")
    parser.add_argument("--pretrained", help="weight file of the teacher, if it is not found by its tag")
    parser.add_argument(
        "--images", type=int, default=4, help="number of images whose regions are printed and drawn (4)"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder of the picture")
    parser.add_argument("--device", default=device, help=f"device of the teacher ({device})")
    args = parser.parse_args(argv)
    if args.images < 1:
        raise UsageError("--images must be at least 1: change it.")
    return args


def print_contents(cache: RegionCache) -> None:
    """Print the facts of the manifest and the numbers of regions per image."""
    manifest, recipe = cache.manifest, cache.manifest["recipe"]
    shards = manifest["shards"]
    per_image = torch.tensor([len(cache.regions(image_id)) for image_id in cache.image_ids()])
    print(f"{cache.folder}: {manifest['regions']} regions of {manifest['images']} images of {recipe['dataset']}")
    print(f"  {len(shards)} shards, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB, teacher {cache.teacher}")
    for name in ("boxes", "crops"):
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in recipe[name].items()))
    computed = {tuple(shard.get(key) for key in ("device", "threads", "batch_size", "torch")) for shard in shards}
    hosts = [f"{d}, {t} threads, batches of {b}, torch {v}" for d, t, b, v in sorted(computed, key=str)]
    print(f"  computed on: {'; '.join(hosts)}")
    print(
        f"  regions per image: least {per_image.min()}, median {per_image.median()}, most {per_image.max()}; "
        f"{int((per_image == 0).sum())} images have none"
    )
    for image_id, text in cache.unreadable.items():
        print(f"  image id {image_id} could not be read: {text}")


def words_of(args: argparse.Namespace, cache: RegionCache) -> tuple[Teacher, Vocabulary]:
    """(teacher of the cache, words to compare its regions with).

    Raises:
        CacheError: the teacher or the vocabulary file does not match the teacher of the cache.
        UsageError: no words are given, and the data set is not registered.
    """
    stated = cache.teacher
    teacher = Teacher.load(stated.architecture, args.pretrained or stated.pretrained, args.device)
    cache.require_teacher(teacher.fingerprint, "the teacher that was loaded")
    if args.vocabulary:
        vocabulary = Vocabulary.load(args.vocabulary)
        cache.require_teacher(vocabulary.teacher, f"the vocabulary file {args.vocabulary}")
        return teacher, vocabulary
    if args.words:
        words = read_words(args.words)
        return teacher, Vocabulary.build(words.names, teacher, args.templates, synonyms=words.synonyms)
    split = split_of(cache.manifest["recipe"]["dataset"])
    if split is None:
        raise UsageError(f"{cache.manifest['recipe']['dataset']} is not registered here: give --words.")
    names, ids = [name for _, name in split.base], [category_id for category_id, _ in split.base]
    return teacher, Vocabulary.build(names, teacher, args.templates, torch.ones(len(names)).bool(), ids)


def records_of(cache: RegionCache) -> Records:
    """{image id: record} of the data set that the cache was built for."""
    name = cache.manifest["recipe"]["dataset"]
    records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
    cache.require_dataset(name, MetadataCatalog.get(name).ov_files()[0])
    return records


def zero_shot_accuracy(cache: RegionCache, records: Records, vocabulary: Vocabulary) -> float | None:
    """Percent of annotated regions whose nearest word is their class; printed with the accuracy of chance.

    Args:
        cache: of annotated boxes.
        records: of :func:`records_of`.
        vocabulary: of K words; regions of other classes do not count.

    Returns:
        The accuracy; None if no region has a class among the words.

    Raises:
        UsageError: the data set has no split.
    """
    dataset = cache.manifest["recipe"]["dataset"]
    split = split_of(dataset)
    if split is None:
        raise UsageError(f"{dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    column = {clean_name(name): position for position, name in enumerate(vocabulary.names)}
    columns = torch.tensor([column.get(clean_name(name), -1) for name in split.names])
    right = total = absent = 0
    for image_id, record in progress_bar(records.items(), desc="classifying annotated regions", unit="image"):
        annotations = record["annotations"]
        embeddings, cached = cache.of_annotations(image_id, [annotation["id"] for annotation in annotations])
        truth = columns[[annotation["category_id"] for annotation in annotations]] if annotations else columns[:0]
        counted = cached & (truth >= 0)
        nearest = (embeddings[counted].float() @ vocabulary.embeddings.T).argmax(dim=1)
        right += int((nearest == truth[counted]).sum())
        total += int(counted.sum())
        absent += int((~cached).sum())
    if not total:
        print("Zero-shot accuracy: none of the words is the class of a cached region.")
        return None
    accuracy = 100 * right / total
    print(
        f"Zero-shot accuracy of {total} annotated regions over {len(vocabulary)} words: {accuracy:.1f}% (chance "
        f"{100 / len(vocabulary):.1f}%); {absent} annotations, crowds included, have no region"
    )
    return accuracy


def draw_nearest(
    args: argparse.Namespace, cache: RegionCache, records: Records, teacher: Teacher, vocabulary: Vocabulary
) -> None:
    """Print the nearest words of some regions of --images images, and draw their crops."""
    recipe, rows, numbered = cache.manifest["recipe"], [], {}
    ids = [image_id for image_id in cache.image_ids() if len(cache.regions(image_id))]
    for image_id in ids[:: max(1, len(ids) // args.images)][: args.images]:
        regions, path = cache.regions(image_id), records[image_id]["file_name"]
        image = torch.from_numpy(read_image(path, "RGB").copy()).permute(2, 0, 1)
        boxes = boxes_to_cut(regions.boxes_xyxy[:_PER_IMAGE], recipe["crops"]["scales"], *image.shape[-2:])
        how = (recipe["crops"]["policy"], recipe["crops"]["filter"], teacher.mean_colour)
        crops = crop_regions(image, boxes, recipe["crops"]["side"], *how)
        cosines = regions.embeddings[:_PER_IMAGE].float() @ vocabulary.embeddings.T
        best = cosines.topk(min(3, len(vocabulary)), dim=1)
        names = [
            ", ".join(f"{vocabulary.names[w]} {c:.2f}" for w, c in zip(*pair))
            for pair in zip(best.indices, best.values)
        ]
        print(f"image id {image_id} ({path})")
        for box, score, text in zip(regions.boxes_xyxy.tolist(), regions.scores.tolist(), names):
            print(f"  box {[round(v) for v in box]} score {score:.2f}: {text}")
        rows.append(
            (crops.unflatten(0, (-1, len(recipe["crops"]["scales"]))), [_drawn(vocabulary, w[0]) for w in best.indices])
        )
        numbered |= {word: vocabulary.names[int(word[1:])] for word in rows[-1][1] if word.startswith("#")}
    if rows:
        args.output.mkdir(parents=True, exist_ok=True)
        sheet(rows).save(args.output / PICTURE)
        print(f"{args.output / PICTURE}: the crops of these regions, each with its nearest word")
    if numbered:
        print(f"No installed font has the characters of: {', '.join(f'{n} {word}' for n, word in numbered.items())}")


def _drawn(vocabulary, index):
    """A word as it is drawn: on one line, or its number if no font has its characters."""
    name = " ".join(vocabulary.names[index].split())
    return name if font_file(name) and not name.startswith("#") else f"#{int(index)}"


def sheet(rows: Sequence[tuple[torch.Tensor, Sequence[str]]]) -> Image.Image:
    """A picture with a row per image: the crops of each region side by side, its nearest word below.

    Args:
        rows: of each image (crops [R, S, 3, side, side] uint8 RGB of R regions at S scales, their R words).
    """
    side, scales = rows[0][0].shape[-1], rows[0][0].shape[1]
    width, height = side * scales + 8, side + 18
    canvas = Image.new("RGB", (width * _PER_IMAGE, height * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for top, (crops, names) in enumerate(rows):
        for left, (region, name) in enumerate(zip(crops, names)):
            for offset, crop in enumerate(region):
                canvas.paste(
                    Image.fromarray(crop.permute(1, 2, 0).numpy()), (left * width + offset * side, top * height)
                )
            _write(draw, name, (left * width + 2, top * height + side + 2), width - 4)
    return canvas


def _write(draw, name, place, width):
    """A word in any script, cut to a width in pixels."""
    file, text = font_file(name), name
    font = ImageFont.truetype(file, 11) if file else ImageFont.load_default(11)
    while len(text) > 1 and draw.textlength(text, font=font) > width:
        text = f"{text[:-2]}\u2026"
    draw.text(place, text, fill="black", font=font)


if __name__ == "__main__":
    with exit_on_error():
        main()
