r"""Time the region cache: embedding against the bare encoder and against a plain loop, reading against raw memory maps.

    python tools/bench_cache.py --images datasets/ov_shapes/val2017
    python tools/bench_cache.py --images datasets/coco/train2017 --architectures ViT-B-32 ViT-L-14 --boxes 100   # a GPU

Each figure is a ratio of medians of runs that alternate in one process, so that a busy machine disturbs both sides
alike; it still wants to be alone. Weights are random except for embedded models; boxes are drawn at random.

- *encoder*: seconds of the teacher's forward pass alone over as many crops in the same batches, divided by seconds of
  the builder (decode, cut, resize, embed). 1 would mean that cropping costs nothing.
- *loop*: seconds of the plain way (PIL crop, open_clip's own transform, one forward pass per image) divided by ours.
- *reading*: seconds of copying the embeddings of random images straight out of memory maps of the shards, divided by
  those of copying what :class:`RegionCache` gives.
- *sample*: seconds of a training sample with cached regions divided by those of one without.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from ovdet2.caches.region_boxes import BoxFilters, FoundBoxes
from ovdet2.caches.region_cache import RegionCache, Regions, shard_name
from ovdet2.caches.region_cache_writer import CacheWriter
from ovdet2.caches.region_embedding import DTYPES, CropRecipe, ShardEmbedder
from ovdet2.config import get_cfg
from ovdet2.data.sample_maker import SampleMaker, build_sample_maker
from ovdet2.errors import DataError, exit_on_error
from ovdet2.io.images import image_size
from ovdet2.methods.vild.sample import AttachCachedRegions
from ovdet2.vlm.crops import scale_boxes
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher, embedded_models

_FACTORS = (1.0, 1.5)


def main(argv=None):
    """Command line; returns {figure: ratio or rate}."""
    args = parse_args(argv)
    records = records_of(args.images, args.count)
    results = {}
    for architecture in args.architectures:
        results |= throughput(args, architecture, records)
    if not args.no_reading:
        with tempfile.TemporaryDirectory() as folder:
            cache = made_up_cache(folder, records, args)
            results |= {"reading": reading(cache, args), "sample": sample(cache, records, args)}
    for name, value in results.items():
        print(f"{name}: {value:.3g}")
    return results


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, type=Path, help="folder of image files")
    parser.add_argument("--count", type=int, default=16, help="images used")
    parser.add_argument("--boxes", type=int, default=6, help="boxes an image, embedded at 1x and 1.5x")
    parser.add_argument("--architectures", nargs="+", default=["ovshapes-vit", "ViT-B-32"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--regions", type=int, default=300, help="regions an image, for reading")
    parser.add_argument("--dim", type=int, default=512, help="dimensions, for reading")
    parser.add_argument("--cached-images", type=int, default=2000, help="images of the cache that is read at random")
    parser.add_argument("--side", type=int, default=800, help="shorter side of a training image, for the sample")
    parser.add_argument("--no-reading", action="store_true", help="leave out reading and sample")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def records_of(folder, count):
    """Records of the first images of a folder."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:count]
    if not paths:
        raise DataError(f"{folder} holds no .jpg or .png image: give a folder of images.")
    sizes = [image_size(path) for path in paths]
    return [
        {"file_name": str(path), "image_id": number, "width": width, "height": height, "annotations": []}
        for number, (path, (width, height)) in enumerate(zip(paths, sizes))
    ]


def random_boxes(record, count):
    """Boxes [count, 4] whose sides are drawn evenly in log scale from a twentieth to the whole of the image's."""
    rng = np.random.default_rng(record["image_id"])
    limits = np.array([record["width"], record["height"]])
    sides = limits * 20 ** -rng.random((count, 2))
    low = rng.random((count, 2)) * (limits - sides)
    return torch.from_numpy(np.concatenate([low, low + sides], axis=1)).float()


def load(architecture, device):
    """The teacher: embedded, or of random weights."""
    if architecture in embedded_models():
        return Teacher.load(architecture, "embedded", device)
    clip = open_clip.create_model(architecture)
    return Teacher(clip, open_clip.get_tokenizer(architecture), Fingerprint(architecture, "random")).to(device)


@torch.no_grad()
def throughput(args, architecture, records):
    """Ratios to the bare encoder and to the plain loop, and crops per second."""
    teacher = load(architecture, args.device)

    def source(record):
        boxes = random_boxes(record, args.boxes)
        return FoundBoxes(boxes, torch.ones(len(boxes)), torch.full((len(boxes),), -1))

    recipe = CropRecipe(factors=_FACTORS, batch_size=args.batch_size, dtype=args.dtype)
    embedder = ShardEmbedder(teacher, source, BoxFilters(), recipe)
    count = len(records) * args.boxes * len(_FACTORS)
    batch = torch.rand(args.batch_size, 3, teacher.image_size, teacher.image_size, device=args.device)

    def encoder():
        for start in range(0, count, args.batch_size):
            # Without Teacher.encode_image's own conversions: what open_clip needs and no more.
            chunk = batch[: min(args.batch_size, count - start)]
            with torch.autocast(batch.device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
                teacher.clip.encode_image(chunk)
        _wait(args.device)

    def ours():
        embedder.embed(records)
        _wait(args.device)

    transform = open_clip.image_transform(
        teacher.image_size, is_train=False, mean=teacher.mean_colour, interpolation=teacher.interpolation
    )

    def loop():
        for record in records:
            image = Image.open(record["file_name"]).convert("RGB")
            boxes = random_boxes(record, args.boxes)
            scaled = torch.cat([scale_boxes(boxes, f, record["height"], record["width"]) for f in _FACTORS])
            crops = torch.stack([transform(image.crop(tuple(box))) for box in scaled.round().int().tolist()])
            with torch.autocast(batch.device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
                embeddings = F.normalize(teacher.clip.encode_image(crops.to(args.device)), dim=-1)
            F.normalize(embeddings.view(len(_FACTORS), len(boxes), -1).sum(dim=0), dim=-1).half().cpu()

    seconds = alternate({"encoder": encoder, "ours": ours, "loop": loop}, args.rounds, architecture)
    return {
        f"{architecture} encoder": seconds["encoder"] / seconds["ours"],
        f"{architecture} loop": seconds["loop"] / seconds["ours"],
        f"{architecture} crops/s": count / seconds["ours"],
    }


def made_up_cache(folder, records, args):
    """A cache of random embeddings: of the records' images, and of as many more as are wanted."""
    recipe = {"teacher": Fingerprint("made", "up").to_dict(), "dim": args.dim, "dataset": "", "dataset_sha256": ""}
    writer = CacheWriter(folder, recipe, range(max(args.cached_images, len(records))), 200, "tools/bench_cache.py")
    rows = F.normalize(torch.randn(args.regions, args.dim), dim=1).half()
    none, scores = torch.full((args.regions,), -1), torch.rand(args.regions)
    boxes = [random_boxes(record, args.regions) for record in records]
    for index in writer.claimed():
        ids = writer.shards[index]
        writer.write(index, [Regions(boxes[i % len(boxes)], rows.roll(i, 0), none, scores) for i in ids])
    writer.finish()
    return RegionCache(folder)


def reading(cache, args):
    """A raw memory map against the reader, embeddings of random images; the pages are in memory, the rows not in the
    processor's caches."""
    order, maps = list(cache.image_ids()), []
    for index in range(len(cache.manifest["shards"])):
        path = cache.folder / shard_name(index)
        header = 8 + int.from_bytes(path.open("rb").read(8), "little")
        shape = (len(cache._shard(index)), args.dim)
        maps.append(np.memmap(path, np.float16, "r", header + _offset_in_file(path, "embeddings"), shape))
    random.Random(0).shuffle(order)

    def raw():
        for image_id in order:
            shard, row = divmod(image_id, 200)
            np.array(maps[shard][row * args.regions : (row + 1) * args.regions])

    def ours():
        for image_id in order:
            np.array(cache.regions(image_id).embeddings.numpy())

    seconds = alternate({"raw": raw, "ours": ours}, 3 * args.rounds, "reading")
    return seconds["raw"] / seconds["ours"]


def _offset_in_file(path, name):
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length))[name]["data_offsets"][0]


def sample(cache, records, args):
    """A training sample with cached regions against one without."""
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (args.side,), 1333
    torch.set_num_threads(1)  # as in a loader process
    plain = build_sample_maker(cfg, True)
    cached = SampleMaker([*plain.steps[:-1], AttachCachedRegions(cache), plain.steps[-1]])

    def run(chosen):
        np.random.seed(0)
        for record in records:
            chosen(record)

    seconds = alternate({"plain": lambda: run(plain), "cached": lambda: run(cached)}, 3 * args.rounds, "sample")
    return seconds["cached"] / seconds["plain"]


def alternate(sides, rounds, label):
    """Median seconds of each side, run in turn; the first round is not counted."""
    seconds = {name: [] for name in sides}
    for number in tqdm(range(rounds + 1), desc=label):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    with exit_on_error():
        main()
