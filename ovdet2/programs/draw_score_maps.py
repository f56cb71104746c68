r"""Draw the encoder features of a Deformable DETR, and the detections of its first and last decoder layer.

    ovdet2 report score-maps --config-file ovshapes/clip_detr_both_text_r18.yaml --input a.jpg b.png \
        --output output/scores MODEL.WEIGHTS output/ovshapes/clip_detr_both_text/model_final.pth

Writes two pictures per image. <output>/<image>_scores.png shows the l2 norm of the encoder features: the mean over
levels, then every level, each scaled to 0..1; places below --threshold stay grey. <output>/<image>_layers.png shows the
detections of the first decoder layer (left) and of the last (right). The figures of CLIP-DETR compare checkpoints by both.

Exit codes: 2 usage, 3 data, 4 environment.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY

from ovdet2.command_line import add_config_file, add_overrides, command_parser, keep_inputs, options_but
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.modeling import OpenVocabularyDeformableDETR
from ovdet2.predictor import Detector, to_rgb_array
from ovdet2.report.detections import save_picture
from ovdet2.report.score_maps import discriminative_scores, draw_detections, draw_scores, joint_scores

KINDS = ("scores", "layers")  # of the pictures of an image


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Command line; returns the paths of the pictures."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), OpenVocabularyDeformableDETR):
        raise UsageError(
            f"{args.config_file} describes no Deformable DETR, and other detectors have no encoder: give another one."
        )
    if len({path.stem for path in args.input}) < len(args.input):
        raise UsageError("two images have the same name: draw them into different folders.")
    targets = [[args.output / f"{path.stem}_{kind}.png" for kind in KINDS] for path in args.input]
    keep_inputs("--output", itertools.chain(*targets), options_but(args, "output"), cfg.MODEL)
    predictor = Detector(cfg)
    if args.vocabulary is not None:
        predictor.set_vocabulary(args.vocabulary)
    written = []
    for path, files in zip(args.input, targets):
        image = to_rgb_array(path)
        for target, picture in zip(files, pictures(predictor, image, args.threshold, args.confidence)):
            save_picture(target, picture)
            print(target)
            written.append(target)
    return written


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("report score-maps", __doc__)
    add_config_file(parser)
    parser.add_argument("--input", nargs="+", required=True, type=Path, help="image files")
    parser.add_argument("--output", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--vocabulary", help='"cat, red mug" or a text file; default: the classes of the data set')
    parser.add_argument("--threshold", type=float, default=0.5, help="places with a lower score stay grey (0.5)")
    parser.add_argument("--confidence", type=float, default=0.3, help="lowest score of a drawn detection (0.3)")
    add_overrides(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def pictures(
    predictor: Detector, image: np.ndarray, threshold: float, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """The two pictures of an image.

    Args:
        predictor: of an :class:`~ovdet2.modeling.OpenVocabularyDeformableDETR`.
        image: array [H, W, 3] uint8 RGB.
        threshold: places with a lower score stay grey.
        confidence: lowest score of a drawn detection.

    Returns:
        (scores, layers): arrays [*, *, 3] uint8 RGB.
    """
    model, sample = predictor.model, predictor.prepare(image)
    assert isinstance(model, OpenVocabularyDeformableDETR)  # main checks it
    _, memory, _ = model.encode([sample])
    mean, levels = joint_scores(discriminative_scores(memory, 0), image.shape[:2])
    texts = ["all levels", *(f"level {number + 1}" for number in range(len(levels)))]
    scores = [draw_scores(image, of_map, threshold, text) for of_map, text in zip([mean, *levels], texts)]
    before, model.every_layer = model.every_layer, True
    try:
        [output] = model([sample])
    finally:
        model.every_layer = before
    ends = [*output["decoder_layers"], output["instances"]]
    layers = []
    for place in (0, len(ends) - 1):
        drawn = ends[place][ends[place].scores >= confidence].to("cpu")
        layers.append(draw_detections(image, drawn, predictor.names, f"decoder layer {place + 1}"))
    return np.concatenate(scores, axis=1), np.concatenate(layers, axis=1)


if __name__ == "__main__":
    with exit_on_error():
        main()
