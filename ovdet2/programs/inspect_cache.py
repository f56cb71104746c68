r"""Look into a region cache: what it was made of, what its regions are called, and how they look.

    ovdet2 cache inspect output/ovcoco/annotation_cache --output output/inspect
    ovdet2 cache inspect output/ovcoco/region_cache --words "cat, umbrella, red mug" --output output/inspect

Prints the manifest's facts and boxes per image; for a cache of annotations the zero-shot accuracy over base words of
its data set, which falls to chance where images, prompts or weights are not what they should be; and the nearest words
of the regions of some images, drawn into <output>/regions.png as the teacher saw them.
"""

from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from PIL import Image, ImageDraw
from tqdm import tqdm

from ovdet2.caches.region_cache import RegionCache
from ovdet2.command_line import command_parser
from ovdet2.data.datasets import split_of
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.images import read_image
from ovdet2.vlm.crops import boxes_to_cut, crop_regions
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary, parse_words
from ovdet2.vocabulary.templates import clean_name

_PER_IMAGE = 6  # regions printed and drawn


def main(argv=None):
    """Command line; returns {"regions": int, "accuracy": percent or None}."""
    args = parse_args(argv)
    cache = RegionCache(args.cache)
    recipe = cache.manifest["recipe"]
    print_contents(cache)
    teacher, vocabulary = words_of(args, cache)
    records = records_of(cache)
    annotated = recipe["boxes"]["source"] == "annotations"
    accuracy = zero_shot_accuracy(cache, records, vocabulary) if annotated else None
    draw_nearest(args, cache, records, teacher, vocabulary)
    return {"regions": cache.manifest["regions"], "accuracy": accuracy}


def parse_args(argv):
    """The command line of this program."""
    parser = command_parser("cache inspect", __doc__)
    parser.add_argument("cache", help="folder of the cache")
    parser.add_argument("--words", help='"cat, red mug" or a file of words; default: the base words of the data set')
    parser.add_argument("--vocabulary", help="a file of ovdet2 vocab instead")
    parser.add_argument("--templates", default="vild63", help="prompt template set of the words")
    parser.add_argument("--pretrained", help="local weight file of the teacher, where it is not found by its tag")
    parser.add_argument("--images", type=int, default=4, help="images whose regions are named and drawn")
    parser.add_argument("--output", required=True, type=Path, help="folder of the picture")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def print_contents(cache):
    """What the manifest says, and how many regions images have."""
    manifest, recipe = cache.manifest, cache.manifest["recipe"]
    shards = manifest["shards"]
    per_image = torch.tensor([len(cache.regions(image_id)) for image_id in cache.image_ids()])
    print(f"{cache.folder}: {manifest['regions']} regions of {manifest['images']} images of {recipe['dataset']}")
    print(f"  {len(shards)} shards, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB, teacher {cache.teacher}")
    for name in ("boxes", "crops"):
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in recipe[name].items()))
    computed = {tuple(shard.get(key) for key in ("device", "threads", "batch_size", "torch")) for shard in shards}
    print(
        "  computed on: "
        + "; ".join("{}, {} threads, batches of {}, torch {}".format(*how) for how in sorted(computed, key=str))
    )
    print(
        f"  regions per image: least {per_image.min()}, median {per_image.median()}, most {per_image.max()}; "
        f"{int((per_image == 0).sum())} images without"
    )
    for image_id, text in cache.unreadable.items():
        print(f"  image id {image_id} could not be read: {text}")


def words_of(args, cache):
    """(teacher, vocabulary) to ask the cache with.

    Raises:
        CacheError: they are not of the teacher of the cache.
    """
    stated = cache.teacher
    teacher = Teacher.load(stated.architecture, args.pretrained or stated.pretrained, args.device)
    cache.require_teacher(teacher.fingerprint, "the teacher that was loaded")
    if args.vocabulary:
        vocabulary = Vocabulary.load(args.vocabulary)
        cache.require_teacher(vocabulary.teacher, f"the vocabulary file {args.vocabulary}")
        return teacher, vocabulary
    if args.words:
        return teacher, Vocabulary.build(parse_words(args.words), teacher, args.templates)
    split = split_of(cache.manifest["recipe"]["dataset"])
    if split is None:
        raise UsageError(f"{cache.manifest['recipe']['dataset']} is not registered here: give --words.")
    names, ids = [name for _, name in split.base], [category_id for category_id, _ in split.base]
    return teacher, Vocabulary.build(names, teacher, args.templates, torch.ones(len(names)).bool(), ids)


def records_of(cache):
    """{image id: record} of the data set the cache was built for."""
    from detectron2.data import MetadataCatalog

    name = cache.manifest["recipe"]["dataset"]
    records = {record["image_id"]: record for record in DatasetCatalog.get(name)}
    cache.require_dataset(name, MetadataCatalog.get(name).ov_files()[0])
    return records


def zero_shot_accuracy(cache, records, vocabulary):
    """Percent of annotated regions whose nearest word is their class; printed beside chance."""
    split = split_of(cache.manifest["recipe"]["dataset"])
    column = {clean_name(name): position for position, name in enumerate(vocabulary.names)}
    wanted = torch.tensor([column.get(clean_name(name), -1) for name in split.names])
    right = total = absent = 0
    for image_id, record in tqdm(records.items(), desc="naming annotated regions", unit="image"):
        annotations = record["annotations"]
        embeddings, found = cache.of_annotations(image_id, [annotation["id"] for annotation in annotations])
        truth = wanted[[annotation["category_id"] for annotation in annotations]] if annotations else wanted[:0]
        asked = found & (truth >= 0)
        nearest = (embeddings[asked].float() @ vocabulary.embeddings.T).argmax(dim=1)
        right += int((nearest == truth[asked]).sum())
        total += int(asked.sum())
        absent += int((~found).sum())
    if not total:
        print("Zero-shot accuracy: none of the words is the class of a cached region.")
        return None
    accuracy = 100 * right / total
    print(
        f"Zero-shot accuracy of {total} annotated regions over {len(vocabulary)} words: {accuracy:.1f}% (chance "
        f"{100 / len(vocabulary):.1f}%); {absent} annotations, crowds among them, have no region"
    )
    return accuracy


def draw_nearest(args, cache, records, teacher, vocabulary):
    """Print the nearest words of a few regions of a few images, and draw their crops."""
    recipe, rows = cache.manifest["recipe"], []
    ids = [image_id for image_id in cache.image_ids() if len(cache.regions(image_id))]
    for image_id in ids[:: max(1, len(ids) // args.images)][: args.images]:
        found, path = cache.regions(image_id), records[image_id]["file_name"]
        image = torch.from_numpy(read_image(path, "RGB").copy()).permute(2, 0, 1)
        boxes = boxes_to_cut(found.boxes_xyxy[:_PER_IMAGE], recipe["crops"]["scales"], *image.shape[-2:])
        how = (recipe["crops"]["policy"], recipe["crops"]["filter"], teacher.mean_colour)
        crops = crop_regions(image, boxes, recipe["crops"]["side"], *how)
        cosines = found.embeddings[:_PER_IMAGE].float() @ vocabulary.embeddings.T
        best = cosines.topk(min(3, len(vocabulary)), dim=1)
        names = [
            ", ".join(f"{vocabulary.names[w]} {c:.2f}" for w, c in zip(*pair))
            for pair in zip(best.indices, best.values)
        ]
        print(f"image id {image_id} ({path})")
        for box, score, text in zip(found.boxes_xyxy.tolist(), found.scores.tolist(), names):
            print(f"  box {[round(v) for v in box]} score {score:.2f}: {text}")
        rows.append(
            (crops.unflatten(0, (-1, len(recipe["crops"]["scales"]))), [vocabulary.names[w[0]] for w in best.indices])
        )
    if rows:
        args.output.mkdir(parents=True, exist_ok=True)
        sheet(rows).save(args.output / "regions.png")
        print(f"{args.output / 'regions.png'}: the crops of these regions, each with its nearest word")


def sheet(rows):
    """A picture with a row per image: the crops of each region side by side, its nearest word below."""
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
            draw.text((left * width + 2, top * height + side + 2), name, fill="black")
    return canvas


if __name__ == "__main__":
    with exit_on_error():
        main()
