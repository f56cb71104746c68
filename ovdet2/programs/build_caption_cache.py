r"""Embed all captions of a data set with the text tower of a CLIP, for methods that learn from captions.

    ovdet2 cache captions --dataset ov_shapes_captions --architecture ovshapes-resnet --pretrained embedded \
        --output output/ovshapes/captions.safetensors
    ovdet2 cache captions --dataset coco_captions_train --architecture ViT-B-32-quickgelu --pretrained openai \
        --device cuda --output output/coco_captions.safetensors

The data set is one of register_captions. A caption is embedded as it is, without a prompt; one that is longer than the
model's context is cut. An interrupted run starts again. The file states the teacher and the caption files, and a
training refuses a cache of others.

Exit codes: 2 usage, 3 data, 4 environment.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from detectron2.data import DatasetCatalog

import ovdet2.data.datasets  # noqa: F401  registers the data sets
from ovdet2.caches.caption_cache import write_caption_cache
from ovdet2.command_line import command_parser, dataset_files, keep_inputs, options_but
from ovdet2.data.samples import CAPTIONS
from ovdet2.data.source_spec import kind_of
from ovdet2.errors import UsageError, counted, did_you_mean, exit_on_error
from ovdet2.vlm.teacher import Teacher


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the manifest of the cache."""
    args = parse_args(argv)
    keep_inputs("--output", [args.output], options_but(args, "output"), dataset_files(args.dataset))
    known = [name for name in DatasetCatalog.list() if kind_of(name) == CAPTIONS]
    if args.dataset not in known:
        raise UsageError(
            f"{args.dataset!r} is no data set of captions{did_you_mean(args.dataset, known)}: choose one of "
            f"{', '.join(known)}, or register yours with register_captions."
        )
    reader = DatasetCatalog.get(args.dataset)
    teacher = Teacher.load(args.architecture, args.pretrained, args.device)
    manifest = write_caption_cache(args.output, args.dataset, reader, teacher, args.batch_size)
    print(
        f"{args.output}: {counted(manifest['captions'], 'caption')} of {counted(manifest['images'], 'image')} of "
        f"{args.dataset}, {teacher.embed_dim} dimensions, teacher {teacher.fingerprint}"
    )
    return manifest


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("cache captions", __doc__)
    parser.add_argument("--dataset", required=True, help="registered data set of captions")
    parser.add_argument("--architecture", required=True, help="open_clip architecture")
    parser.add_argument("--pretrained", required=True, help="pretrained tag, 'embedded' or a weight file")
    parser.add_argument("--device", default="cpu", help="device of the text encoder (cpu)")
    parser.add_argument("--batch-size", type=int, default=1024, help="captions per forward pass (1024)")
    parser.add_argument("--output", required=True, help="caption cache to write (.safetensors)")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    return args


if __name__ == "__main__":
    with exit_on_error():
        main()
