r"""Draw what a Deformable DETR encodes of an image, and the detections of its first and last decoder layer.

    ovdet2 report score-maps --config-file configs/ovshapes/clip_detr_both_text_r18.yaml --input a.jpg b.png \
        --output output/scores MODEL.WEIGHTS output/ovshapes/clip_detr_both_text/model_final.pth

Writes <output>/<image>_scores.png, the l2 norm of the encoder's features: the mean over the levels, then every level,
each scaled to 0..1; places below --threshold stay grey. And <output>/<image>_layers.png: the detections of the first
decoder layer at the left, of the last at the right. CLIP-DETR's figures compare checkpoints by both.
"""

from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from ovdet2 import Detector
from ovdet2.command_line import add_config_file, add_overrides, command_parser
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.modeling import OpenVocabularyDeformableDETR
from ovdet2.predictor import to_rgb_array
from ovdet2.report.detections import save_picture
from ovdet2.report.score_maps import discriminative_scores, draw_detections, draw_scores, joint_scores


def main(argv=None):
    """Command line; returns the paths written."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), OpenVocabularyDeformableDETR):
        raise UsageError(f"{args.config_file} describes no Deformable DETR: only those have an encoder to draw.")
    if len({path.stem for path in args.input}) < len(args.input):
        raise UsageError("two images have the same name: draw them into different folders.")
    predictor = Detector(cfg)
    if args.vocabulary is not None:
        predictor.set_vocabulary(args.vocabulary)
    written = []
    for path in args.input:
        image = to_rgb_array(path)
        for kind, picture in zip(("scores", "layers"), pictures(predictor, image, args.threshold, args.confidence)):
            target = args.output / f"{path.stem}_{kind}.png"
            save_picture(target, picture)
            print(target)
            written.append(target)
    return written


def parse_args(argv):
    """The command line of this program."""
    parser = command_parser("report score-maps", __doc__)
    add_config_file(parser)
    parser.add_argument("--input", nargs="+", required=True, type=Path, help="images")
    parser.add_argument("--output", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--vocabulary", help='"cat, red mug" or a text file; default: the words of the detector')
    parser.add_argument("--threshold", type=float, default=0.5, help="score below which a place stays grey")
    parser.add_argument("--confidence", type=float, default=0.3, help="least score of a detection that is drawn")
    add_overrides(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def pictures(predictor, image, threshold, confidence):
    """(picture of the scores, picture of the layers) of an image [H, W, 3] uint8 RGB; arrays of the same kind."""
    model, sample = predictor.model, predictor.prepare(image)
    _, memory, _ = model.encode([sample])
    mean, levels = joint_scores(discriminative_scores(memory, 0), image.shape[:2])
    texts = ["all levels", *(f"level {number + 1}" for number in range(len(levels)))]
    scores = [draw_scores(image, of_map, threshold, text) for of_map, text in zip([mean, *levels], texts)]
    before, model.every_layer = model.every_layer, True
    try:
        [found] = model([sample])
    finally:
        model.every_layer = before
    ends = [*found["decoder_layers"], found["instances"]]
    layers = []
    for place in (0, len(ends) - 1):
        kept = ends[place][ends[place].scores >= confidence].to("cpu")
        layers.append(draw_detections(image, kept, predictor.names, f"decoder layer {place + 1}"))
    return np.concatenate(scores, axis=1), np.concatenate(layers, axis=1)


if __name__ == "__main__":
    with exit_on_error():
        main()
