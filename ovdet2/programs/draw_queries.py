r"""Draw where the best queries of a Deformable DETR look, and the boxes that its decoder layers give them.

    ovdet2 report queries --config-file configs/ovshapes/detr_text_r18.yaml --input a.jpg b.png \
        --output output/queries MODEL.WEIGHTS output/ovshapes/detr_text/model_final.pth

Writes <output>/<image>_query<n>.png for the n-th best query, two pictures side by side. Left: the last decoder layer's
reference (white: a box, or a cross for a point) and its sampling points, coloured by level, their area and opacity by
attention weight. Right: the box of every decoder layer, coloured from the first to the last.
"""

from pathlib import Path

import torch
from detectron2.modeling import META_ARCH_REGISTRY

from ovdet2 import Detector
from ovdet2.command_line import add_config_file, add_overrides, command_parser
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.modeling import OpenVocabularyDeformableDETR
from ovdet2.predictor import to_rgb_array
from ovdet2.report.detections import save_picture
from ovdet2.report.query_pictures import draw_query, query_view


def main(argv=None):
    """Command line; returns the paths written."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), OpenVocabularyDeformableDETR):
        raise UsageError(f"{args.config_file} describes no Deformable DETR: only those have queries to draw.")
    predictor = Detector(cfg)
    if args.vocabulary is not None:
        predictor.set_vocabulary(args.vocabulary)
    written = []
    for path in args.input:
        image = to_rgb_array(path)
        for place, (view, text) in enumerate(best_queries(predictor, image, args.queries), start=1):
            target = args.output / f"{path.stem}_query{place}.png"
            if target in written:
                raise UsageError(f"two images are called {path.stem}: draw them into different folders.")
            save_picture(target, draw_query(view, image, text))
            print(f"{target}: {text}")
            written.append(target)
    return written


def parse_args(argv):
    """The command line of this program."""
    parser = command_parser("report queries", __doc__)
    add_config_file(parser)
    parser.add_argument("--input", nargs="+", required=True, type=Path, help="images")
    parser.add_argument("--output", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--vocabulary", help='"cat, red mug" or a text file; default: the words of the detector')
    parser.add_argument("--queries", type=int, default=3, help="queries drawn of an image, best first")
    add_overrides(parser)
    args = parser.parse_args(argv)
    if args.queries < 1:
        raise UsageError("--queries is at least 1: change it.")
    return args


@torch.no_grad()
def best_queries(predictor, image, count):
    """Yield (:class:`~ovdet2.report.query_pictures.QueryView`, text) of the queries that are surest of a word.

    Args:
        predictor: :class:`Detector` of an OpenVocabularyDeformableDETR.
        image: array [H, W, 3] uint8 RGB.
        count: most queries.
    """
    model = predictor.model
    inputs, outputs, _ = model.infer([predictor.prepare(image)], keep_sampling=True)
    scores, words = outputs.pred_logits[-1, 0].float().sigmoid().max(dim=1)
    sizes = inputs.tensor.shape[-2:], inputs.image_sizes[0], image.shape[:2]
    for query in scores.topk(min(count, len(scores))).indices.tolist():
        text = f"query {query}: {predictor.names[words[query]]} {scores[query]:.2f}"
        yield query_view(outputs, 0, query, *sizes), text


if __name__ == "__main__":
    with exit_on_error():
        main()
