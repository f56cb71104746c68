r"""Detect any words in your images and draw the detections.

    ovdet2 predict --config-file ovshapes-vild-ensemble --input a.jpg photos/ "*.png" \
        --vocabulary "striped moon, red star" --output out/
    # a published detector, which is downloaded first; its words are those of LVIS
    ovdet2 predict --model detic-swinb-21k --input a.jpg --output out/
    ovdet2 predict --config-file ovcoco/vild_text_r50.yaml --input a.jpg --vocabulary words.txt --output out/ \
        --confidence-threshold 0.5 MODEL.WEIGHTS output/model_final.pth
    # boxes that fit "plain circle" better than "striped moon" are not detected
    ovdet2 predict --config-file ovshapes-vild --input a.jpg --vocabulary "striped moon" \
        --negative-words "plain circle, plain ring" --output out/
    # a detector with semantic priors: give the words present in the images instead of predicting them
    ovdet2 predict --config-file ovshapes/cckt_full_r18.yaml --input a.jpg --present "red star, moon" \
        --output out/ MODEL.WEIGHTS output/model_final.pth

Trained detectors by name, for --model or --config-file: {detectors}, and the published ones of `ovdet2 zoo list`.

Writes a picture of each image and detections.json to the output folder. Unreadable images are skipped with a message. A
detector with semantic priors requires the words present in each image: its teacher predicts them, or --present gives
them. The prior of a detection is drawn after "<-".

Exit codes: 2 usage, 3 data, 4 environment.
"""

from __future__ import annotations

import argparse
import glob
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import Instances
from torch import Tensor
from tqdm import tqdm

from ovdet2.command_line import (
    add_accept_license,
    add_config_file,
    add_overrides,
    command_parser,
    keep_inputs,
    options_but,
)
from ovdet2.engine.console import open_logs
from ovdet2.errors import DataError, UsageError, counted, exit_on_error
from ovdet2.io.files import write_json
from ovdet2.io.masks import run_length_code
from ovdet2.io.progress import progress_bar
from ovdet2.predictor import FEW_WORDS, Detector, above, to_rgb_array
from ovdet2.report.detections import draw, save_picture
from ovdet2.report.labels import fonts_for
from ovdet2.vocabulary import POOLINGS, parse_words
from ovdet2.zoo import DETECTORS

RECORDS = "detections.json"
DEFAULT_THRESHOLD = 0.3
_SHOWN = 20  # words printed
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Command line; returns the paths of the pictures."""
    args = parse_args(argv)
    open_logs()
    output = Path(args.output)
    pictures = picture_paths(find_images(args.input, output), output)
    written = [output / RECORDS, *pictures.values()]
    keep_inputs("--output", written, pictures.keys(), options_but(args, "output"))
    detector = build_detector(args)
    if args.present is not None and not detector.has_priors:
        raise UsageError("this detector takes no semantic priors: remove --present.")
    threshold = thresholds_of(detector, args.confidence_threshold)
    names = detector.names
    print(f"{counted(len(names), 'word')}: {', '.join(names[:_SHOWN])}{' ...' * (len(names) > _SHOWN)}")
    records, numbered = {}, {}
    try:
        for path, picture in progress_bar(pictures.items(), desc="detecting", unit="image"):
            try:
                image = to_rgb_array(path)
            except DataError as error:
                tqdm.write(f"skipped: {error}")
                continue
            present = None
            if detector.has_priors:
                present = detector.predict_present_words(image) if args.present is None else parse_words(args.present)
            [instances] = detector.predict([image], present, threshold=0.0)
            instances = nms_across_words(instances, threshold, args.overlap)
            save_picture(picture, draw(image, instances, names))
            records[picture] = to_record(path, instances, names, present)
            numbered |= {
                f"#{word}": names[word] for word in instances.pred_classes.tolist() if not fonts_for(names[word])
            }
    finally:
        if records:  # also after an interruption
            write_json(output / RECORDS, list(records.values()), indent=1)
    if not records:
        raise DataError("no image could be read: see the messages above.")
    if numbered:
        print(f"No installed font has the characters of: {', '.join(f'{n} {word}' for n, word in numbered.items())}")
    total = sum(len(record["detections"]) for record in records.values())
    print(f"{counted(total, 'detection')} in {counted(len(records), 'image')}, drawn in {output}")
    return list(records)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    trained_here = ", ".join(name for name, named in DETECTORS.items() if not named.published)
    parser = command_parser("predict", (__doc__ or "").format(detectors=trained_here))
    add_config_file(parser, aliases=("--model",))
    add_accept_license(parser)
    parser.add_argument(
        "--input", nargs="+", required=True, help="image files, folders (with their subfolders) or glob patterns"
    )
    parser.add_argument("--output", required=True, help="folder for the pictures and detections.json")
    parser.add_argument(
        "--vocabulary",
        default=None,
        help='"cat, sofa; couch" (synonyms after semicolons), a .txt or .json word list, or a vocabulary file; default: '
        "the words of the training",
    )
    parser.add_argument(
        "--present", help='words present in the images, "cat, red mug", for a detector with semantic priors'
    )
    parser.add_argument(
        "--negative-words",
        help='words that absorb detections and are not detected, "mirror, poster", or a word list or vocabulary file',
    )
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="names of a word: the mean of their embeddings (default), or the maximum of their scores",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        help=f"draw detections with a higher score; default: the thresholds of the vocabulary, else {DEFAULT_THRESHOLD}",
    )
    parser.add_argument(
        "--overlap", type=float, default=0.6, help="IoU threshold of the class-agnostic NMS across words (0.6)"
    )
    parser.add_argument(
        "--competitors",
        choices=("auto", "off"),
        default="auto",
        help=f"with fewer than {FEW_WORDS} words, base words of the training compete with them (auto)",
    )
    add_overrides(parser)
    return parser.parse_args(argv)


def build_detector(args: argparse.Namespace) -> Detector:
    """The detector with the words of the options.

    Raises:
        UsageError: --negative-words or --pooling without --vocabulary.
    """
    if args.vocabulary is None and (args.negative_words is not None or args.pooling):
        raise UsageError("--negative-words and --pooling need --vocabulary: name the words to detect as well.")
    detector = Detector(
        args.config_file, overrides=args.opts, competitors=args.competitors, accept_license=args.accept_license
    )
    if args.vocabulary is not None:
        detector.set_vocabulary(args.vocabulary, negative_words=args.negative_words, pooling=args.pooling)
    return detector


def thresholds_of(detector: Detector, given: float | None) -> Tensor | float:
    """The threshold of --confidence-threshold; without it Tensor [K] of those of the vocabulary, or the default."""
    if given is not None or detector.thresholds is None:
        return DEFAULT_THRESHOLD if given is None else given
    chosen = int((~detector.thresholds.isnan()).sum())
    print(f"thresholds of the vocabulary: {chosen} of {counted(len(detector.names), 'word')}, else {DEFAULT_THRESHOLD}")
    return detector.thresholds.nan_to_num(DEFAULT_THRESHOLD)


def find_images(inputs: Sequence[str], output: Path | None = None) -> list[Path]:
    """Image paths of files, folders (sorted, with subfolders) and glob patterns ("**" too), in the order given, each once.

    What a folder or pattern holds besides images is counted and printed. Hidden files and folders, such as the "._a.jpg"
    that macOS puts beside "a.jpg", are read only if an input names them, or their folder.

    Args:
        inputs: files, folders and patterns.
        output: folder that is not searched, unless an input names a file in it, or the folder or one in it:
            it may hold the pictures of an earlier run.

    Raises:
        UsageError: an input matches nothing.
    """
    paths, others = [], Counter()
    for item in inputs:
        path = Path(item)
        if path.is_file():
            paths.append(path)
            continue
        if path.is_dir():
            every = sorted(each for each in path.rglob("*") if each.is_file() and not _is_within(each, output, path))
            files = [each for each in every if not _is_hidden(each, path)]
            others.update({"hidden": len(every) - len(files)} if len(every) > len(files) else ())
        else:
            files = sorted(each for each in map(Path, glob.glob(item, recursive=True)) if each.is_file())
        matches = [each for each in files if _is_image(each)]
        others.update(each.suffix.lower() or "no suffix" for each in files if not _is_image(each))
        if not matches:
            held = f" (but {counted(len(files), 'file')} of other types)" if files else ""
            raise UsageError(
                f"--input {item}: no such file, no image in that folder, or nothing matches the pattern{held}. Images "
                f"are {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        paths.extend(matches)
    if others:
        shown = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        print(f"not read, since they are no images: {shown}")
    return list(dict.fromkeys(paths))


def _is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_hidden(path, searched):
    """Whether a name below the searched folder starts with a dot."""
    return any(part.startswith(".") for part in path.relative_to(searched).parts)


def _is_within(path, output, searched):
    """Whether a file is in the folder ``output``, which is a folder below the one that is searched."""
    if output is None or output.resolve() not in path.resolve().parents:
        return False
    return searched.resolve() in output.resolve().parents


def picture_paths(images: Sequence[Path], output: Path) -> dict[Path, Path]:
    """{image: its picture in the folder ``output``}, no two the same."""
    names = [image.stem for image in images]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    used = set(names) - repeated
    pictures: dict[Path, Path] = {}
    for image, name in zip(images, names):
        if name in repeated:  # a/1.jpg and b/1.png would overwrite each other
            with_folder = f"{image.parent.name}_{name}"
            further = (f"{with_folder}_{number}" for number in itertools.count(2))
            name = next(each for each in itertools.chain([name, with_folder], further) if each not in used)
            used.add(name)
        pictures[image] = output / f"{name}.png"
    return pictures


def nms_across_words(instances: Instances, threshold: Tensor | float, overlap: float) -> Instances:
    """Class-agnostic NMS across words, so that an object is drawn with its best word only.

    Args:
        instances: detections of one image.
        threshold: detections with a score of at most this are dropped; or Tensor [K], one threshold for each word.
        overlap: IoU above which the worse of two detections is dropped.

    Returns:
        The remaining detections, best first.
    """
    from detectron2.layers import nms

    instances = above(threshold, instances)
    return instances[nms(instances.pred_boxes.tensor, instances.scores, overlap)]  # pyrefly: ignore[bad-index]  indices


def to_record(
    path: Path, instances: Instances, names: Sequence[str], present: Sequence[str] | None = None
) -> dict[str, Any]:
    """The entry of an image in detections.json.

    Args:
        path: of the image.
        instances: its detections, boxes XYXY in pixels; a mask becomes the "segmentation" of COCO's json.
        names: K words.
        present: words present in the image, for a detector with semantic priors; the entry then has them, and the
            "prior" of each detection.
    """
    detections = [
        {"word": names[word], "score": round(score, 4), "box_xyxy": [round(v, 1) for v in box]}
        for box, score, word in zip(
            instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()
        )
    ]
    if instances.has("pred_masks"):
        for detection, mask in zip(detections, instances.pred_masks.numpy()):
            detection["segmentation"] = run_length_code(mask)
    if present is None:
        return {"image": str(path), "detections": detections}
    for detection, prior in zip(detections, instances.prior_words.tolist()):
        detection["prior"] = names[prior] if prior >= 0 else None
    return {"image": str(path), "present": present, "detections": detections}


if __name__ == "__main__":
    with exit_on_error():
        main()
