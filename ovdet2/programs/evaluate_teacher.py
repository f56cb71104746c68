r"""Classify ground-truth boxes with a CLIP (zero-shot): the upper bound of what it can teach on a data set.

    ovdet2 teacher --dataset ov_shapes_val_all --architecture ovshapes-resnet --pretrained embedded --output out/
    # regions pooled from one pass over the image, instead of a pass per crop
    ovdet2 teacher --dataset ov_shapes_val_all \
        --architecture ovshapes-resnet --pretrained embedded --regions dense --side 256 --output out/

Prints top-1 accuracy over base and novel boxes, and the table of the evaluator (each box with its probability for each
word). Run it before training: a wrong CLIP or wrong prompts lower the accuracy.

Exit codes: 2 usage, 3 data, 4 environment.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ovdet2.command_line import command_parser, dataset_files, keep_inputs, options_but
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.evaluation.evaluation import REPORT
from ovdet2.evaluation.prediction_files import MERGED
from ovdet2.evaluation.setting import NONE, Setting
from ovdet2.evaluation.training_setting import teacher_data
from ovdet2.io.files import write_json
from ovdet2.io.images import read_image
from ovdet2.io.progress import progress_bar
from ovdet2.vlm.crops import embed_regions
from ovdet2.vlm.dense import embed_regions_dense
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Command line; returns {"accuracy-novel": percent, "accuracy-base": percent, ...}."""
    args = parse_args(argv)
    written = (Path(args.output) / name for name in ("accuracy.json", REPORT, MERGED, "report.html"))
    keep_inputs("--output", written, options_but(args, "output"), dataset_files(args.dataset))
    split = split_of(args.dataset)
    if split is None:
        raise UsageError(f"{args.dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    if args.square and args.regions != "dense":
        raise UsageError("--square is for the dense map: add --regions dense.")
    teacher = Teacher.load(args.architecture, args.pretrained, args.device)
    vocabulary = Vocabulary.build(split.names, teacher, args.templates, split.base_mask, split.category_ids)
    evaluator = OpenVocabularyEvaluator(args.dataset, args.output, facts={"setting": _setting(teacher)})
    evaluator.reset()
    if args.regions == "dense":
        embed = partial(embed_regions_dense, side=args.side, square=args.square)
    else:
        embed = partial(embed_regions, factors=args.factors)
    hits = []
    for record in progress_bar(DatasetCatalog.get(args.dataset), desc="classifying boxes", unit="image"):
        boxes, classes = truth_of(record)
        probs = classify(teacher, vocabulary, record["file_name"], boxes, embed)
        hits.append(torch.stack([classes, probs.argmax(1).cpu() == classes], dim=1))
        evaluator.process(
            [record], [{"instances": every_pair(boxes, probs.cpu(), (record["height"], record["width"]))}]
        )
    evaluator.evaluate()
    accuracy = accuracies(torch.cat(hits), split)
    write_json(
        Path(args.output) / "accuracy.json",
        {"teacher": str(teacher.fingerprint), "templates": args.templates, "regions": args.regions} | accuracy,
        indent=1,
    )
    print(", ".join(f"{name} {value:.2f}" for name, value in accuracy.items()))
    return accuracy


def _setting(teacher: Teacher) -> dict[str, str]:
    """The setting of a CLIP: ground-truth boxes are given to it, and it was trained on none."""
    name = f"{teacher.fingerprint.architecture} {teacher.fingerprint.pretrained}"
    data = teacher_data(teacher.fingerprint.pretrained)
    setting = Setting(NONE, NONE, NONE, "no", name, data, stated_by="ovdet2 teacher")
    return setting.to_report()


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("teacher", __doc__)
    parser.add_argument("--dataset", required=True, help="registered data set with a base/novel split")
    parser.add_argument("--architecture", required=True, help="open_clip architecture")
    parser.add_argument("--pretrained", required=True, help="tag, 'embedded' or a weight file")
    parser.add_argument("--templates", default="vild63", help="prompt template set")
    parser.add_argument(
        "--regions",
        choices=["crops", "dense"],
        default="crops",
        help="a pass per crop, or features pooled from one pass over the image",
    )
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 1.5], help="crops, as multiples of the box")
    parser.add_argument("--side", type=int, default=1024, help="dense: longest edge of the resized image, in pixels")
    parser.add_argument("--square", action="store_true", help="dense: pad the image to a square, as CLIM evaluates")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", required=True, help="folder of the results")
    return parser.parse_args(argv)


def truth_of(record: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(boxes [G, 4] XYXY float, contiguous classes [G] long) of the objects of a record that are not crowd."""
    annotations = [annotation for annotation in record["annotations"] if not annotation.get("iscrowd", 0)]
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.long)


def classify(
    teacher: Teacher,
    vocabulary: Vocabulary,
    path: str | Path,
    boxes: Tensor,
    embed: Callable[[Teacher, Tensor, Tensor], Tensor],
) -> Tensor:
    """Zero-shot probabilities [G, K] of the boxes of an image file; ``embed(teacher, image, boxes)`` gives [G, D]."""
    pixels = torch.from_numpy(read_image(path, "RGB").copy()).permute(2, 0, 1)
    return teacher.classify(embed(teacher, pixels, boxes), vocabulary.embeddings)


def every_pair(boxes: Tensor, probs: Tensor, image_size: tuple[int, int]) -> Instances:
    """Each box once per word, scored by its probability."""
    regions, words = torch.meshgrid(torch.arange(len(boxes)), torch.arange(probs.shape[1]), indexing="ij")
    return Instances(
        image_size, pred_boxes=Boxes(boxes[regions.flatten()]), scores=probs.flatten(), pred_classes=words.flatten()
    )


def accuracies(hits: Tensor, split: Split) -> dict[str, float]:
    """Percent of boxes whose best word is right, per subset; ``hits`` is [G, 2] of (class, right)."""
    classes, right = hits[:, 0], hits[:, 1].float()
    ids = torch.tensor(split.category_ids)[classes]
    base = torch.tensor(split.base_mask)[classes]
    subsets = {"novel": ~base, "base": base, "all": torch.ones_like(base)}
    subsets |= {group: torch.isin(ids, torch.tensor(wanted)) for group, wanted in split.groups.items()}
    return {f"accuracy-{name}": 100 * right[mask].mean().item() for name, mask in subsets.items()}


if __name__ == "__main__":
    with exit_on_error():
        main()
