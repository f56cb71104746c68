"""Draw detections of any words on images, folders and glob patterns.

    ovdet2 predict --config-file configs/ovshapes/vild_text_r18.yaml --input a.jpg dir/ "*.png" \
        --vocabulary "striped moon, red star" --output out/ MODEL.WEIGHTS output/model_final.pth

A detector with semantic priors reads the words present in each image: those that its teacher predicts, or --present.
Each detection then has the word that it was found with, in the picture after "<-".
"""

from __future__ import annotations

import argparse
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from ovdet2.command_line import add_config_file, add_overrides, command_parser
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import write_json
from ovdet2.predictor import Detector, to_rgb_array
from ovdet2.report.detections import draw, save_picture
from ovdet2.vocabulary import parse_words

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Command line; returns the list of written pictures."""
    args = parse_args(argv)
    setup_logger(name="ovdet2")
    predictor = Detector(args.config_file, overrides=args.opts)
    if args.present is not None and not predictor.has_priors:
        raise UsageError("--present is for detectors with semantic priors: leave it out.")
    if args.vocabulary is not None:
        predictor.set_vocabulary(args.vocabulary)
    print(
        f"{len(predictor.names)} words: {', '.join(predictor.names[:20])}{' ...' if len(predictor.names) > 20 else ''}"
    )
    records = {}
    output = Path(args.output)
    try:
        for path in tqdm(find_images(args.input), desc="detecting", unit="image"):
            try:
                image = to_rgb_array(path)
            except DataError as error:
                tqdm.write(f"skipped: {error}")
                continue
            present = None
            if predictor.has_priors:
                present = predictor.predict_present_words(image) if args.present is None else parse_words(args.present)
            found = predictor.predict(image, present)
            instances = best_per_object(found, args.confidence_threshold, args.overlap)
            picture = output / f"{path.stem}.png"
            if picture in records:  # a/1.jpg and b/1.png would overwrite each other
                picture = output / f"{path.parent.name}_{path.stem}_{len(records)}.png"
            save_picture(picture, draw(image, instances, predictor.names))
            records[picture] = to_record(path, instances, predictor.names, present)
    finally:
        if records:  # an interruption keeps what was found
            write_json(output / "detections.json", list(records.values()), indent=1)
    if not records:
        raise DataError("no image could be read: see the messages above.")
    found = sum(len(record["detections"]) for record in records.values())
    print(f"{found} detections in {len(records)} images, drawn in {output}")
    return list(records)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("predict", __doc__)
    add_config_file(parser)
    parser.add_argument("--input", nargs="+", required=True, help="images, folders, glob patterns")
    parser.add_argument("--output", required=True, help="folder for the pictures and detections.json")
    parser.add_argument(
        "--vocabulary", default=None, help='"cat, red mug" or a text file; default: the data set\'s names'
    )
    parser.add_argument("--present", help="words present in the images, for a detector with semantic priors")
    parser.add_argument("--confidence-threshold", type=float, default=0.3, help="drawn above this score")
    parser.add_argument(
        "--overlap", type=float, default=0.6, help="of boxes that overlap more, whatever their word, the best is drawn"
    )
    add_overrides(parser)
    return parser.parse_args(argv)


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Image paths of files, folders (their images, sorted, not recursive) and glob patterns, in the order given.

    Raises:
        UsageError: an input matches nothing.
    """
    found = []
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        else:
            matches = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(item))
        if not matches:
            raise UsageError(f"--input {item}: no such file, no image in that folder, or nothing matches the pattern.")
        found.extend(matches)
    return list(dict.fromkeys(found))


def best_per_object(instances: Instances, threshold: float, overlap: float) -> Instances:
    """Instances above ``threshold`` after NMS across words: two words for one object would be drawn over each other."""
    from detectron2.layers import nms

    instances = instances[instances.scores > threshold]
    return instances[nms(instances.pred_boxes.tensor, instances.scores, overlap)]


def to_record(
    path: Path, instances: Instances, names: Sequence[str], present: Sequence[str] | None = None
) -> dict[str, Any]:
    """JSON-serialisable detections of one image; boxes XYXY in pixels. With semantic priors also the words ``present``
    and the "prior" of each detection."""
    detections = [
        {"word": names[word], "score": round(score, 4), "box_xyxy": [round(v, 1) for v in box]}
        for box, score, word in zip(
            instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()
        )
    ]
    if present is None:
        return {"image": str(path), "detections": detections}
    for detection, prior in zip(detections, instances.prior_words.tolist()):
        detection["prior"] = names[prior] if prior >= 0 else None
    return {"image": str(path), "present": present, "detections": detections}


if __name__ == "__main__":
    with exit_on_error():
        main()
