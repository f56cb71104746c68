#!/usr/bin/env python
"""Zero-shot naming of ground-truth boxes by crops, dense map or attention pool, and pictures of the map's response.

    python projects/CLIM/eval_regions.py --dataset ov_shapes_val_all --architecture ovshapes-vit --side 288 \
        --pretrained embedded output/clim/ovshapes_vit/clim_a1.safetensors --output out/
    python projects/CLIM/eval_regions.py --architecture ovshapes-vit --pretrained embedded clim_a1.safetensors \
        --side 288 --words "striped ring" "plain moon" --images a.jpg b.jpg c.jpg d.jpg --mosaic 2 --output out/

Each weight file gives a row, so before and after stand side by side. Without --mosaic there is a picture per image.
"""

import argparse
from pathlib import Path

import torch
from clim.regions import evaluate, table
from clim.response import draw_responses, mosaic_of, response_maps

from ovdet2.command_line import dataset_files, keep_inputs, options_but
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.files import write_json
from ovdet2.io.images import read_image
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary


def main(argv=None):
    """Command line; returns the list of :func:`clim.regions.evaluate`'s results, empty without --dataset."""
    args = parse_args(argv)
    if not args.dataset and not args.words:
        raise UsageError("there is nothing to do: give --dataset to name boxes, or --words and --images to draw.")
    if args.square and not args.dataset:
        raise UsageError("--square is of the naming of boxes: give --dataset.")
    if bool(args.words) != bool(args.images) or (args.mosaic and len(args.images) < args.mosaic**2):
        raise UsageError("a picture needs --words and --images, and --mosaic G at least G * G images.")
    output, results = Path(args.output), []
    drawn = (output / f"response_{number}.png" for number in range(len(args.images)))
    keep_inputs("--output", [output / "regions.json", *drawn], options_but(args, "output"), dataset_files(args.dataset))
    teachers = [Teacher.load(args.architecture, weights, args.device) for weights in args.pretrained]
    if args.dataset:
        settings = args.dataset, args.side, args.factors, args.templates, args.limit, args.square
        results = [evaluate(teacher, *settings) for teacher in teachers]
        write_json(output / "regions.json", results, indent=1)
        print(table(results, [teacher.fingerprint.pretrained for teacher in teachers]))
    if args.words:
        draw(args, teachers, output)
    return results


def draw(args, teachers, output):
    """Write response_<n>.png for each image, or one for their mosaic."""
    images = [torch.from_numpy(read_image(path, "RGB").copy()).permute(2, 0, 1) for path in args.images]
    if args.mosaic:
        images = [mosaic_of(images, args.mosaic)]
    embedded = [Vocabulary.build(args.words, teacher, args.templates).embeddings for teacher in teachers]
    for number, image in enumerate(images):
        maps = [response_maps(teacher, image, words, args.side) for teacher, words in zip(teachers, embedded)]
        names = [teacher.fingerprint.pretrained for teacher in teachers]
        draw_responses(output / f"response_{number}.png", image, args.words, maps, names)
        print(output / f"response_{number}.png")


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", required=True, help="open_clip architecture")
    parser.add_argument("--pretrained", required=True, nargs="+", help="tags, 'embedded' or weight files")
    parser.add_argument("--dataset", default="", help="whose ground-truth boxes are named")
    parser.add_argument("--side", type=int, required=True, help="longest edge of the image for the map, in pixels")
    parser.add_argument(
        "--square", action="store_true", help="with --dataset: pad images to a square, as the authors do"
    )
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.5], help="crops, as multiples of the box")
    parser.add_argument("--templates", default="vild63", help="prompt template set")
    parser.add_argument("--limit", type=int, default=0, help="only the first images of the data set; 0: all")
    parser.add_argument("--words", nargs="+", default=[], help="words whose response is drawn")
    parser.add_argument("--images", nargs="+", default=[], help="image files to draw it on")
    parser.add_argument("--mosaic", type=int, default=0, metavar="G", help="draw on a mosaic of the first G * G images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with exit_on_error():
        main()
