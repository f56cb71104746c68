r"""Draw where the best queries of a Deformable DETR look, and the boxes of all decoder layers.

    ovdet2 report queries --config-file ovshapes/detr_text_r18.yaml --input a.jpg b.png \
        --output output/queries MODEL.WEIGHTS output/ovshapes/detr_text/model_final.pth

Writes <output>/<image>_query<n>.png for the n-th best query, two pictures side by side. Left: the reference of the last
decoder layer in white (a box, or a cross for a point) and its sampling points, whose colour is the level, and whose
area and opacity are the attention weight. Right: the box of every decoder layer, coloured from the first to the last.

Exit codes: 2 usage, 3 data, 4 environment.
"""

import argparse
from collections.abc import Iterator, Sequence
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
from ovdet2.report.labels import as_drawn
from ovdet2.report.query_pictures import QueryView, draw_query, query_view


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Command line; returns the paths of the pictures."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    if not issubclass(META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE), OpenVocabularyDeformableDETR):
        raise UsageError(
            f"{args.config_file} describes no Deformable DETR, and other detectors have no queries: give another one."
        )
    targets = (target_of(args, path, place) for path in args.input for place in range(1, args.queries + 1))
    keep_inputs("--output", targets, options_but(args, "output"), cfg.MODEL)
    predictor = Detector(cfg)
    if args.vocabulary is not None:
        predictor.set_vocabulary(args.vocabulary)
    written = []
    for path in args.input:
        image = to_rgb_array(path)
        for place, (view, text) in enumerate(best_queries(predictor, image, args.queries), start=1):
            target = target_of(args, path, place)
            if target in written:
                raise UsageError(f"two images have the name {path.stem}: draw them into different folders.")
            save_picture(target, draw_query(view, image, text))
            print(f"{target}: {text}")
            written.append(target)
    return written


def target_of(args: argparse.Namespace, path: Path, place: int) -> Path:
    """The picture of the query at a place, from 1, of an image."""
    return args.output / f"{path.stem}_query{place}.png"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program.

    Raises:
        UsageError: --queries is below 1.
    """
    parser = command_parser("report queries", __doc__)
    add_config_file(parser)
    parser.add_argument("--input", nargs="+", required=True, type=Path, help="image files")
    parser.add_argument("--output", required=True, type=Path, help="folder of the pictures")
    parser.add_argument("--vocabulary", help='"cat, red mug" or a text file; default: the classes of the data set')
    parser.add_argument("--queries", type=int, default=3, help="number of queries drawn per image, best first (3)")
    add_overrides(parser)
    args = parser.parse_args(argv)
    if args.queries < 1:
        raise UsageError("--queries must be at least 1: change it.")
    return args


@torch.no_grad()
def best_queries(predictor: Detector, image: np.ndarray, count: int) -> Iterator[tuple[QueryView, str]]:
    """Yield (view, caption) of the queries with the highest scores.

    Args:
        predictor: of an :class:`~ovdet2.modeling.OpenVocabularyDeformableDETR`.
        image: array [H, W, 3] uint8 RGB.
        count: number of queries; all if there are fewer.
    """
    model = predictor.model
    assert isinstance(model, OpenVocabularyDeformableDETR)  # main checks it
    inputs, outputs, _ = model.infer([predictor.prepare(image)], keep_sampling=True)
    scores, words = outputs.pred_logits[-1, 0].float().sigmoid().max(dim=1)
    sizes = inputs.tensor.shape[-2:], inputs.image_sizes[0], image.shape[:2]
    for query in scores.topk(min(count, len(scores))).indices.tolist():
        text = f"query {query}: {as_drawn(predictor.names[words[query]], int(words[query]))} {scores[query]:.2f}"
        yield query_view(outputs, 0, query, *sizes), text


if __name__ == "__main__":
    with exit_on_error():
        main()
