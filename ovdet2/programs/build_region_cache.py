r"""Embed regions of every training image with the teacher: proposals for distillation, or annotated boxes.

    # proposals of a detector trained on base boxes (ViLD)
    ovdet2 cache build --config-file ovcoco/vild_text_r50.yaml \
        --dataset ov_coco_train_base --output output/ovcoco/region_cache \
        MODEL.WEIGHTS output/ovcoco/vild_text_r50/model_final.pth
    # annotated base boxes, by annotation id
    ovdet2 cache build --config-file ovcoco/vild_text_r50.yaml \
        --dataset ov_coco_train_base --boxes annotations --output output/ovcoco/annotation_cache
    # estimate boxes, bytes and time without writing anything
    ovdet2 cache build --config-file ovcoco/vild_text_r50.yaml \
        --dataset ov_coco_train_base --boxes annotations --output output/ovcoco/annotation_cache --dry-run

--boxes also accepts a file: a COCO-results json, or a proposal file of Detectron2 (.pkl, only arrays are read from it).
ovdet2 cannot check how the boxes of a file were made: if their detector was trained on novel classes, the result is not
open-vocabulary.

Each box is cropped from the original image at every scale of --scales, resized to the teacher's input as --crop states,
and embedded; the embeddings are summed and divided by their norm (ViLD Eq. 1). The teacher is that of the configuration,
or of --architecture and --pretrained, so that a detector trained with one CLIP can propose boxes for another.

Several processes can build one cache at the same time, on one machine or on many that share the output folder: start the
same command several times, under torchrun (torchrun --nproc-per-node 8 -m ovdet2 cache build ...), or as a Slurm array
(--shard I/N, I from 0). Processes claim shards, so no work is done twice. A killed run loses its current shard, and the
same command continues. See docs/CACHES.md.

Exit codes: 2 usage, 3 data, 4 environment.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ovdet2.caches.region_boxes import AnnotationBoxes, BoxFilters, BoxSource, FileBoxes
from ovdet2.caches.region_cache import MANIFEST, Regions
from ovdet2.caches.region_cache_writer import CacheWriter
from ovdet2.caches.region_embedding import DTYPES, CropRecipe, ShardEmbedder
from ovdet2.command_line import add_config_file, add_overrides, command_parser, dataset_files, keep_inputs, options_but
from ovdet2.config import load_config, settle_device
from ovdet2.data.datasets import split_of
from ovdet2.data.records import load_records
from ovdet2.engine import torchrun_rank
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import sha256_file
from ovdet2.io.images import read_image
from ovdet2.io.progress import progress_bar
from ovdet2.modeling import build_teacher
from ovdet2.vlm.crops import POLICIES, crop_regions, pillow_crops
from ovdet2.vlm.teacher import Teacher

_SAMPLE_IMAGES = 8  # of a dry run
_COMPARED_CROPS = 16


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Command line; returns the manifest of the cache, None while others are still at work or after --dry-run."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = device_of(cfg)
    taken = cfg.MODEL, options_but(args, "output"), dataset_files(args.dataset)
    keep_inputs("--output", [Path(args.output) / MANIFEST, *Path(args.output).glob("shard-*.safetensors")], taken)
    records = sorted(load_records([args.dataset], "--dataset", False, base_only=True), key=lambda r: r["image_id"])
    if split_of(args.dataset) is None:
        raise UsageError(f"{args.dataset} has no base and novel classes: name a data set registered by ovdet2.")
    teacher = teacher_of(args, cfg)
    boxes, filters = boxes_of(args, cfg, [record["image_id"] for record in records])
    batch_size = args.batch_size or (64 if cfg.MODEL.DEVICE == "cpu" else 512)
    crops = CropRecipe(args.crop, tuple(args.scales), args.dtype, batch_size)
    workers = cfg.DATALOADER.NUM_WORKERS if args.workers is None else args.workers
    embedder = ShardEmbedder(teacher, boxes, filters, crops, workers)
    recipe = recipe_of(args, embedder)
    if args.dry_run:
        print_estimate(args, embedder, records)
        return None
    ids = [record["image_id"] for record in records]
    writer = CacheWriter(args.output, recipe, ids, args.images_per_shard, command_of(argv))
    by_id = {record["image_id"]: record for record in records}
    if args.verify:
        verify(args, writer, by_id)
    build(args, cfg, embedder, writer, by_id)
    return summary(args, writer, teacher)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("cache build", __doc__)
    add_config_file(parser)
    parser.add_argument("--dataset", required=True, help="registered training set, base classes only")
    parser.add_argument("--output", required=True, help="folder of the cache")
    parser.add_argument("--architecture", help="of the teacher; default MODEL.TEACHER")
    parser.add_argument("--pretrained", help="of the teacher: tag, 'embedded' or a weight file")
    parser.add_argument("--boxes", default="proposals", metavar="annotations|proposals|FILE")
    parser.add_argument("--min-score", type=float, help="lowest score of a box; default: any")
    parser.add_argument("--min-side", type=float, help="least width and least height of a box, pixels; default: any")
    parser.add_argument(
        "--nms", type=float, help="IoU of the NMS over all boxes of an image; default 0.7, annotations none"
    )
    parser.add_argument("--top", type=int, help="boxes kept per image, best first; default 300, annotations all")
    parser.add_argument("--crop", default="warp", choices=POLICIES, help="how a box becomes a square")
    parser.add_argument("--scales", type=_numbers, default=[1.0, 1.5], help="sizes of the crops in boxes, 1.0,1.5")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES), help="of the teacher's arithmetic")
    parser.add_argument("--batch-size", type=int, help="crops per forward pass; default 64 on a CPU, 512 on a GPU")
    parser.add_argument("--images-per-shard", type=int, default=200)
    parser.add_argument("--workers", type=int, help="processes that decode images; default DATALOADER.NUM_WORKERS")
    parser.add_argument(
        "--shard", type=_share, default=None, metavar="I/N", help="only every N-th shard, from the I-th"
    )
    parser.add_argument("--verify", action="store_true", help="read every shard and build damaged ones anew")
    parser.add_argument("--dry-run", action="store_true", help="print boxes, bytes and time; write nothing")
    add_overrides(parser)
    args = parser.parse_args(argv)
    counts = [n for n in (args.images_per_shard, args.batch_size, args.top) if n is not None]
    if min(counts) < 1 or min(args.scales) <= 0 or (args.nms is not None and not 0 < args.nms <= 1):
        parser.error(
            "--top, --batch-size and --images-per-shard are at least 1, --nms is above 0 and at most 1, --scales are "
            "above 0"
        )
    if bool(args.architecture) != bool(args.pretrained):
        parser.error("--architecture and --pretrained go together")
    return args


def _numbers(text):
    return [float(number) for number in text.split(",")]


def _share(text):
    number, _, count = text.partition("/")
    number, count = int(number), int(count)
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"{text}: I is 0 to N - 1")
    return number, count


def command_of(argv: Sequence[str]) -> str:
    """What completes the cache: the command without what is this process's own."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word == "--shard":
            skip = True
        elif word not in ("--verify", "--dry-run") and not word.startswith("--shard="):
            kept.append(word)
    return "ovdet2 cache build " + shlex.join(kept)


def device_of(cfg: CfgNode) -> str:
    """MODEL.DEVICE, one GPU for each process under torchrun, and the CPU if no GPU is available."""
    settle_device(cfg)
    if cfg.MODEL.DEVICE == "cpu":
        return "cpu"
    if "LOCAL_RANK" not in os.environ:
        return cfg.MODEL.DEVICE
    if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise UsageError(
            f"there are more processes than the {torch.cuda.device_count()} GPUs of this machine: start torchrun with "
            f"--nproc-per-node {torch.cuda.device_count()}."
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


def teacher_of(args: argparse.Namespace, cfg: CfgNode) -> Teacher:
    """The teacher of the cache, on its device."""
    if args.architecture:
        return Teacher.load(args.architecture, args.pretrained, cfg.MODEL.DEVICE)
    return build_teacher(cfg).to(cfg.MODEL.DEVICE)


def boxes_of(args: argparse.Namespace, cfg: CfgNode, image_ids: Sequence[int]) -> tuple[BoxSource, BoxFilters]:
    """(source of boxes, its filters) for a data set's images."""
    if args.boxes == "annotations":
        return AnnotationBoxes(), BoxFilters(args.min_score, args.min_side, args.nms, args.top)
    nms, top = 0.7 if args.nms is None else args.nms, 300 if args.top is None else args.top
    filters = BoxFilters(args.min_score, args.min_side, nms, top)
    if args.boxes != "proposals":
        source = FileBoxes(args.boxes)
        print(f"{args.boxes} has boxes for {source.require_images(image_ids)} of {len(image_ids)} images")
        return source, filters
    from ovdet2.engine.region_proposals import ProposalBoxes, proposing_config  # builds the detector

    return ProposalBoxes.load(proposing_config(cfg, filters), args.dataset), filters


def recipe_of(args: argparse.Namespace, embedder: ShardEmbedder[BoxSource]) -> dict[str, Any]:
    """What decides the values of a cache; :class:`CacheWriter` and readers compare it."""
    teacher, crops = embedder.teacher, embedder.crops
    return {
        "teacher": teacher.fingerprint.to_dict(),
        "dim": teacher.embed_dim,
        "dataset": args.dataset,
        "dataset_sha256": sha256_file(MetadataCatalog.get(args.dataset).ov_files()[0]),
        "boxes": embedder.boxes.recipe() | {"filters": embedder.filters.to_dict()},
        "crops": {
            "policy": crops.policy,
            "scales": list(crops.factors),
            "side": teacher.image_size,
            "filter": teacher.interpolation,
            "mean": teacher.mean.flatten().tolist(),
            "std": teacher.std.flatten().tolist(),
            "dtype": crops.dtype,
        },
    }


def share_of(writer: CacheWriter, share: tuple[int, int] | None) -> set[int] | None:
    """Numbers of every N-th shard from the I-th, for a pair (I, N); None for None, which stands for all."""
    return None if share is None else {i for i in range(len(writer.shards)) if i % share[1] == share[0]}


def verify(args: argparse.Namespace, writer: CacheWriter, by_id: Mapping[int, Mapping[str, Any]]) -> None:
    """Remove damaged shards, and those with images that could not be read and can be by now."""

    def is_mended(image_id):
        try:
            read_image(by_id[int(image_id)]["file_name"])
        except DataError:
            return False
        return True

    removed = writer.remove_damaged(
        share_of(writer, args.shard or torchrun_rank()),
        lambda header: any(map(is_mended, header.get("unreadable", {}))),
        partial(progress_bar, desc="shards verified", leave=False),
    )
    print(f"{args.output}: {len(removed)} shards to build anew{' ' + str(removed) if removed else ''}")


def build(
    args: argparse.Namespace,
    cfg: CfgNode,
    embedder: ShardEmbedder[BoxSource],
    writer: CacheWriter,
    by_id: Mapping[int, Mapping[str, Any]],
) -> None:
    """Write the shards that are missing and not somebody else's."""
    only = share_of(writer, args.shard)
    rank, ranks = torchrun_rank() or (0, 1)  # begin apart, then help one another
    start = len(writer.missing()) * rank // ranks
    images = sum(len(ids) for index, ids in enumerate(writer.shards) if only is None or index in only)
    done = images - sum(len(writer.shards[i]) for i in writer.missing() if only is None or i in only)
    unreadable = {}
    with progress_bar(total=images, initial=done, desc="images") as progress:
        for index in writer.claimed(start, only):
            records = [by_id[image_id] for image_id in writer.shards[index]]
            regions, faults = embedder.embed(records, progress.update)
            unreadable |= faults
            _require_few(unreadable, cfg)
            facts = embedder.facts() | ({"unreadable": faults} if faults else {})
            writer.write(index, regions, facts)


def _require_few(unreadable, cfg):
    limit = cfg.DATALOADER.MAX_BAD_IMAGES  # what training tolerates, too
    if len(unreadable) > limit:
        raise DataError(
            f"{len(unreadable)} images cannot be used, DATALOADER.MAX_BAD_IMAGES is {limit}:\n  "
            + "\n  ".join(unreadable.values())
            + "\nMend them, or raise DATALOADER.MAX_BAD_IMAGES; the same command goes on, with --verify also in the "
            "shards that were written without such images."
        )


def summary(args: argparse.Namespace, writer: CacheWriter, teacher: Teacher) -> dict[str, Any] | None:
    """Finish the manifest if every shard is there, and say what the cache holds; returns the manifest or None."""
    manifest = writer.finish(partial(progress_bar, desc="shards hashed", leave=False))
    if manifest is None:
        left = len(writer.missing())
        print(f"{args.output}: this part is done; {left} of {len(writer.shards)} shards are left to other processes.")
        return None
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    print(
        f"{args.output}: {manifest['regions']} regions of {manifest['images']} images in {len(manifest['shards'])} "
        f"shards, {size:.1f} MB, teacher {teacher.fingerprint}"
    )
    unreadable = [text for shard in manifest["shards"] for text in shard.get("unreadable", {}).values()]
    if unreadable:
        print("Without regions, since they cannot be read:\n  " + "\n  ".join(unreadable))
        print("After they are repaired, the same command with --verify embeds them.")
    return manifest


def print_estimate(
    args: argparse.Namespace, embedder: ShardEmbedder[BoxSource], records: Sequence[Mapping[str, Any]]
) -> None:
    """Boxes, bytes and hours of the complete cache, from a few images spread over the data set."""
    chosen = records[:: max(1, len(records) // _SAMPLE_IMAGES)][:_SAMPLE_IMAGES]
    embedder.embed(chosen[:1])  # the first pass allocates
    start = time.perf_counter()
    regions, faults = embedder.embed(chosen)
    seconds = (time.perf_counter() - start) / max(1, len(chosen)) * len(records)
    per_image = sum(map(len, regions)) / max(1, len(chosen) - len(faults))
    count = round(per_image * len(records))
    row = 2 * embedder.teacher.embed_dim + 16 + 8 + 4  # embedding, box, annotation id, score
    print(
        f"{args.dataset}: {len(records)} images, about {count} boxes ({per_image:.1f} an image), "
        f"{(count * row + 16 * len(records)) / 1e9:.2f} GB, about {seconds / 3600:.2f} hours in one process like this "
        f"one, from {len(chosen)} images; a batch is {embedder.crops.batch_size} crops, the result of a shard "
        f"{per_image * args.images_per_shard * row / 1e6:.0f} MB of memory."
    )
    compared = compare_with_pillow(embedder, chosen, regions)
    if compared is not None:
        print(
            f"Cosine to crops resized by Pillow, {len(compared)} regions: least {compared.min():.5f}, "
            f"mean {compared.mean():.5f}"
        )


def compare_with_pillow(
    embedder: ShardEmbedder[BoxSource], records: Sequence[Mapping[str, Any]], regions: Sequence[Regions]
) -> torch.Tensor | None:
    """Cosines between embeddings of our crops and of Pillow's, for a few boxes; None if there are no boxes."""
    for record, found in zip(records, regions):
        if len(found):
            teacher, policy = embedder.teacher, embedder.crops.policy
            image = torch.from_numpy(read_image(record["file_name"], "RGB").copy()).permute(2, 0, 1)
            boxes, how = found.boxes_xyxy[:_COMPARED_CROPS], (policy, teacher.interpolation, teacher.mean_colour)
            ours = crop_regions(image.to(teacher.mean.device), boxes, teacher.image_size, *how)
            theirs = pillow_crops(image, boxes, teacher.image_size, *how)
            return (teacher.encode_image(ours) * teacher.encode_image(theirs)).sum(dim=1).cpu()
    return None


if __name__ == "__main__":
    with exit_on_error():
        main()
