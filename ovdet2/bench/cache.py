r"""Time the region cache: embedding against the bare encoder and against a plain loop, reading against raw memory maps.

    ovdet2 bench cache --images datasets/ov_shapes/val2017
    ovdet2 bench cache --images datasets/coco/train2017 --architectures ViT-B-32 ViT-L-14 --boxes 100   # a GPU

Weights are random except for embedded models; boxes are drawn at random. For each teacher, ratios to the builder
(decode, cut, resize, embed) of:
- *encoder*: the teacher's forward passes over as many crops in the same batches. 1 would mean that cropping costs
  nothing.
- *loop*: the simplest implementation: PIL crop, open_clip's transform, one forward pass per image.
Then the time to copy the embeddings of random images from raw memory maps of the shards, divided by the time to copy
them through :class:`RegionCache`. ``ovdet2 bench cache`` also compares training samples with and without cached
regions.
"""

import argparse
import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ovdet2.bench.harness import Benchmark, Candidate, Case, Comparison, Results, positive
from ovdet2.caches.region_boxes import BoxFilters, FoundBoxes
from ovdet2.caches.region_cache import RegionCache, Regions, shard_name
from ovdet2.caches.region_cache_writer import CacheWriter
from ovdet2.caches.region_embedding import DTYPES, CropRecipe, ShardEmbedder
from ovdet2.errors import DataError
from ovdet2.io.files import sha256_file, write_json
from ovdet2.io.images import image_size, open_image
from ovdet2.vlm.crops import scale_boxes
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher, embedded_models

TRUTH, CACHE = "truth.json", "cache"  # in the folder of the made-up cache
_FACTORS, _IMAGES_PER_SHARD = (1.0, 1.5), 200
OPTIONS = {
    "--images": {"type": Path, "required": True, "help": "folder of image files"},
    "--count": {"type": positive, "default": 16, "help": "images used"},
    "--boxes": {"type": positive, "default": 6, "help": "boxes an image, embedded at 1x and 1.5x"},
    "--architectures": {"nargs": "+", "default": ["ovshapes-vit", "ViT-B-32"]},
    "--batch-size": {"type": positive, "default": 64},
    "--dtype": {"default": "fp32", "choices": sorted(DTYPES)},
    "--regions": {"type": positive, "default": 300, "help": "regions an image, for reading"},
    "--dim": {"type": positive, "default": 512, "help": "dimensions, for reading"},
    "--cached-images": {"type": int, "default": 2000, "help": "images of the cache that is read at random"},
    "--side": {"type": positive, "default": 800, "help": "shorter side of a training image"},
    "--no-reading": {"action": "store_true", "help": "do not measure reading"},
}


def plan(
    args: argparse.Namespace, more: Sequence[Callable[[argparse.Namespace], Comparison]] = ()
) -> Iterator[Comparison]:
    """Each teacher, then reading, then ``more``.

    Args:
        args: options.
        more: functions of the options; their ``folder`` has a made-up cache of the images: TRUTH, a COCO file of them,
            and CACHE, of the teacher ViT-B-32 / openai.
    """
    records = records_of(args.images, args.count)
    for architecture in args.architectures:
        yield embedding(args, architecture, records)
    if not args.no_reading:
        make_cache(args.folder, records, args)
        yield reading(args.folder / CACHE, args)
        for comparison_of in more:
            yield comparison_of(args)


def records_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """Records of the first images of a folder.

    Raises:
        DataError: there are none.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:count]
    if not paths:
        raise DataError(f"{folder} holds no .jpg or .png image: give a folder of images.")
    sizes = [image_size(path) for path in paths]
    return [
        {"file_name": str(path), "image_id": number, "width": width, "height": height, "annotations": []}
        for number, (path, (width, height)) in enumerate(zip(paths, sizes))
    ]


def random_boxes(record: dict[str, Any], count: int) -> Tensor:
    """Boxes [count, 4], XYXY pixels, with sides log-uniform between a twentieth of the image's side and all of it."""
    rng = np.random.default_rng(record["image_id"])
    limits = np.array([record["width"], record["height"]])
    sides = limits * 20 ** -rng.random((count, 2))
    low = rng.random((count, 2)) * (limits - sides)
    return torch.from_numpy(np.concatenate([low, low + sides], axis=1)).float()


def load_teacher(architecture: str, device: str) -> Teacher:
    """An embedded teacher, or one of random weights."""
    if architecture in embedded_models():
        return Teacher.load(architecture, "embedded", device)
    clip = open_clip.create_model(architecture)
    return Teacher(clip, open_clip.get_tokenizer(architecture), Fingerprint(architecture, "random")).to(device)


def embedding(args: argparse.Namespace, architecture: str, records: list[dict[str, Any]]) -> Comparison:
    """The builder, the encoder and the loop with one teacher."""
    teacher = functools.cache(lambda: load_teacher(architecture, args.device))
    candidates = [
        Candidate("builder", lambda: builder_of(teacher(), args), lambda build, _: build.embed(records)),
        Candidate("encoder", teacher, lambda loaded, _: encode_noise(loaded, len(records), args)),
        Candidate("loop", teacher, lambda loaded, _: plain_loop(loaded, records, args)),
    ]
    case = Case({"what": architecture, "of": f"{len(records) * args.boxes * len(_FACTORS)} crops"})
    return Comparison(candidates, [case])


def builder_of(teacher: Teacher, args: argparse.Namespace) -> ShardEmbedder:
    """The embedder of ovdet2 cache build."""

    def source(record):
        boxes = random_boxes(record, args.boxes)
        return FoundBoxes(boxes, torch.ones(len(boxes)), torch.full((len(boxes),), -1))

    recipe = CropRecipe(factors=_FACTORS, batch_size=args.batch_size, dtype=args.dtype)
    return ShardEmbedder(teacher, source, BoxFilters(), recipe)


@torch.no_grad()
def encode_noise(teacher: Teacher, images: int, args: argparse.Namespace) -> None:
    """Forward passes without Teacher.encode_image's own conversions: only what open_clip requires."""
    count, side = images * args.boxes * len(_FACTORS), teacher.image_size
    batch = torch.rand(min(count, args.batch_size), 3, side, side, device=args.device)
    for start in range(0, count, args.batch_size):
        with _precision(args):
            teacher.clip.encode_image(batch[: count - start])


@torch.no_grad()
def plain_loop(teacher: Teacher, records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Embed image by image with PIL and open_clip's transform."""
    made = open_clip.image_transform(
        teacher.image_size, is_train=False, mean=tuple(teacher.mean_colour), interpolation=teacher.interpolation
    )
    transform = cast(Callable[[Image.Image], Tensor], made)  # several only for training
    for record in records:
        image = open_image(record["file_name"]).convert("RGB")
        boxes = random_boxes(record, args.boxes)
        scaled = torch.cat([scale_boxes(boxes, f, record["height"], record["width"]) for f in _FACTORS])
        crops = torch.stack([transform(image.crop(tuple(box))) for box in scaled.round().int().tolist()])
        with _precision(args):
            embeddings = F.normalize(teacher.clip.encode_image(crops.to(args.device)), dim=-1)
        F.normalize(embeddings.view(len(_FACTORS), len(boxes), -1).sum(dim=0), dim=-1).half().cpu()


def _precision(args):
    return torch.autocast(args.device.split(":")[0], DTYPES[args.dtype], enabled=args.dtype != "fp32")


def make_cache(folder: Path, records: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write TRUTH and CACHE with random embeddings: of the records' images, and of --cached-images in all."""
    images = [{"id": r["image_id"], "file_name": Path(r["file_name"]).name, "width": r["width"], "height": r["height"]}
              for r in records]  # fmt: skip
    objects = [{"id": r["image_id"] + 1, "image_id": r["image_id"], "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81,
                "iscrowd": 0} for r in records]  # fmt: skip
    write_json(folder / TRUTH, {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]})
    dataset = {"dataset": TRUTH, "dataset_sha256": sha256_file(folder / TRUTH)}
    recipe = {"teacher": Fingerprint("ViT-B-32", "openai").to_dict(), "dim": args.dim} | dataset
    ids = range(max(args.cached_images, len(records)))
    writer = CacheWriter(folder / CACHE, recipe, ids, _IMAGES_PER_SHARD, "ovdet2 bench cache")
    rows = F.normalize(torch.randn(args.regions, args.dim), dim=1).half()
    none, scores = torch.full((args.regions,), -1), torch.rand(args.regions)
    boxes = [random_boxes(record, args.regions) for record in records]
    for index in writer.claimed():
        ids = writer.shards[index]
        writer.write(index, [Regions(boxes[i % len(boxes)], rows.roll(i, 0), none, scores) for i in ids])
    writer.finish()


def reading(folder: Path, args: argparse.Namespace) -> Comparison:
    """Raw memory maps against the reader, embeddings of random images; the pages are in memory, the rows not in the
    processor's caches."""
    cache = RegionCache(folder)
    order, maps = list(cache.image_ids()), []
    for index, shard in enumerate(cache.manifest["shards"]):
        path = folder / shard_name(index)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            start = 8 + length + json.loads(file.read(length))["embeddings"]["data_offsets"][0]
        maps.append(np.memmap(path, np.float16, "r", start, (shard["regions"], args.dim)))
    random.Random(0).shuffle(order)

    def raw(*_):
        for image_id in order:
            shard, row = divmod(image_id, _IMAGES_PER_SHARD)
            np.array(maps[shard][row * args.regions : (row + 1) * args.regions])

    def read(*_):
        for image_id in order:
            np.array(cache.regions(image_id).embeddings.numpy())

    candidates = [Candidate("RegionCache", lambda: None, read), Candidate("memory map", lambda: None, raw)]
    case = Case({"what": "reading", "of": f"{len(order)} images of {args.regions} x {args.dim} float16"})
    return Comparison(candidates, [case])


def main(argv: Sequence[Any] | None = None, more: Sequence[Callable[..., Comparison]] = ()) -> Results:
    """See :meth:`~ovdet2.bench.harness.Benchmark.main`, and :func:`plan` for ``more``."""
    full = functools.partial(plan, more=more)
    return Benchmark("ovdet2.bench.cache", __doc__, OPTIONS, full, memory=False, turn_options=("--rounds",)).main(argv)


if __name__ == "__main__":
    main()
