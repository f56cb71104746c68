r"""Annotate novel classes in the training images with a trained detector, for a second round of training.

    ovdet2 dataset pseudo-labels --config-file ovcoco/cckt_r50.yaml --dataset ov_coco_train_base \
        --output datasets/coco/annotations/ov_coco_train_pseudo.json \
        MODEL.WEIGHTS model_final.pth MODEL.CCKT.PRIOR_FILE priors_of_the_training_images.safetensors

The detector detects all words of the data set. A detection of a novel word becomes an annotation beside the base ones
("pseudo": true, "score") if its score is at least --min-score and it overlaps no annotation. This is the second round of
CCKT-Det's Table 2.

Pseudo labels use the names of novel classes in training. The novel AP of a detector trained on them is therefore not
comparable with that of a detector trained without. The json records this, ovdet2 refuses it unless the data set is
registered with pseudo_labels, and the report of a detector trained on it lists the words. In the second round every word
counts as base; the program prints the DATASETS.OWN for it. To measure base and novel classes, evaluate on the original
test set with ovdet2 eval.

Exit codes: 2 usage, 3 data, 4 environment.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from torchvision.ops import box_iou, nms

from ovdet2.command_line import add_config_file, add_overrides, command_parser, dataset_files, keep_inputs, options_but
from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split, read_coco_json
from ovdet2.engine.console import open_logs
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import sha256_file, write_json
from ovdet2.io.progress import progress_bar


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the json that was written."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    keep_inputs("--output", [args.output], options_but(args, "output"), cfg.MODEL, dataset_files(args.dataset))
    split = split_of(args.dataset)
    if split is None or not split.novel:
        raise UsageError(f"{args.dataset} has no novel classes: name a training set of an open-vocabulary split.")
    if not cfg.MODEL.WEIGHTS:
        raise UsageError("pseudo labels need a trained detector: give MODEL.WEIGHTS.")
    open_logs()
    json_file, image_root = MetadataCatalog.get(args.dataset).ov_files()
    data = read_coco_json(json_file)
    boxes = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        boxes[annotation["image_id"]].append(annotation["bbox"])
    pseudo = []
    for image_id, instances in detections(cfg, args.dataset):
        selected = select(instances, boxes[image_id], len(split.base), args.min_score, args.overlap)
        pseudo.extend(annotations(image_id, selected, split.category_ids))
    joined = joined_json(data, pseudo, split, args, cfg)
    write_json(args.output, joined)
    names = dict(zip(split.category_ids, split.names))
    counts = Counter(names[annotation["category_id"]] for annotation in pseudo)
    print(f"{len(pseudo)} pseudo labels of {len(counts)} novel classes in {args.output}, by class: {dict(counts)}")
    own = {"name": "pseudo_train", "json": str(args.output), "images": str(image_root), "base": list(split.names)}
    print(f"DATASETS.OWN of the second round, beside a test set of the same classes: {own | {'pseudo_labels': True}}")
    return joined


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of this program."""
    parser = command_parser("dataset pseudo-labels", __doc__)
    add_config_file(parser, purpose="of the trained detector")
    parser.add_argument("--dataset", required=True, help="registered training set with base annotations only")
    parser.add_argument("--output", required=True, type=Path, help="json to write")
    parser.add_argument("--min-score", type=float, default=0.9, help="lowest score of a pseudo label (0.9)")
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        help="discard a detection with a larger IoU with an annotation or a better pseudo label (0.5)",
    )
    add_overrides(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def detections(cfg: CfgNode, dataset: str) -> Iterator[tuple[int, Instances]]:
    """Yield (image id, :class:`Instances` on the CPU) of every image of a data set."""
    from ovdet2.data.loader import build_test_loader
    from ovdet2.engine import Trainer

    cfg = cfg.clone()
    cfg.DATASETS.TEST, cfg.TEST.DISTRACTORS = (dataset,), []
    model = Trainer.build_trained(cfg)
    for batch in progress_bar(build_test_loader(cfg, dataset), desc="images"):
        for record, output in zip(batch, model(batch)):
            yield record["image_id"], output["instances"].to("cpu")


def select(
    instances: Instances, annotated_xywh: Sequence[Sequence[float]], num_base: int, min_score: float, overlap: float
) -> Instances:
    """The detections of one image that become annotations.

    Args:
        instances: :class:`Instances` in pixels of the original image.
        annotated_xywh: boxes (x, y, width, height) of the image's annotations, crowds included.
        num_base: class indices of at least this number are novel.
        min_score: lowest score.
        overlap: a detection with a larger IoU with an annotation or with a better detection is discarded.

    Returns:
        :class:`Instances` of novel classes with positive area, best first.
    """
    boxes = instances.pred_boxes.tensor
    sides = boxes[:, 2:] - boxes[:, :2]
    mask = (instances.pred_classes >= num_base) & (instances.scores >= min_score) & (sides > 0).all(dim=1)
    if annotated_xywh:
        annotated = torch.tensor(annotated_xywh, dtype=boxes.dtype)
        annotated[:, 2:] += annotated[:, :2]
        mask &= box_iou(boxes, annotated).amax(dim=1) <= overlap
    instances = instances[mask]
    return instances[nms(instances.pred_boxes.tensor, instances.scores, overlap)]  # pyrefly: ignore[bad-index]  indices


def annotations(image_id: int, instances: Instances, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """COCO annotations without ids, marked as pseudo labels.

    Args:
        image_id: of the image.
        instances: of :func:`select`, boxes XYXY in pixels of the original image.
        category_ids: of each class index.
    """
    result = []
    for box, score, label in zip(
        instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()
    ):
        width, height = box[2] - box[0], box[3] - box[1]
        result.append(
            {
                "image_id": image_id,
                "category_id": category_ids[label],
                "bbox": [box[0], box[1], width, height],
                "area": width * height,
                "iscrowd": 0,
                "score": score,
                "pseudo": True,
            }
        )
    return result


def joined_json(
    data: Mapping[str, Any], pseudo: Sequence[Mapping[str, Any]], split: Split, args: argparse.Namespace, cfg: CfgNode
) -> dict[str, Any]:
    """The training json with pseudo labels, their categories and a record of their origin in "info".

    Args:
        data: the training json, base annotations only.
        pseudo: of :func:`annotations`.
        split: of the data set.
        args: of :func:`parse_args`.
        cfg: of the detector.

    Raises:
        DataError: the json already has pseudo labels.
    """
    info = data["info"] if isinstance(data.get("info"), dict) else {}
    if info.get("pseudo_labels"):
        raise DataError(f"{args.dataset} already has pseudo labels: start from the annotations without them.")
    first = 1 + max((annotation["id"] for annotation in data["annotations"]), default=0)
    numbered = [{"id": first + number, **annotation} for number, annotation in enumerate(pseudo)]
    listed = {category["id"] for category in data["categories"]}
    categories = [{"id": number, "name": name} for number, name in split.novel if number not in listed]
    origin = {
        "annotations": len(pseudo),
        "words": [name for _, name in split.novel],
        "min_score": args.min_score,
        "overlap": args.overlap,
        "weights_sha256": sha256_file(cfg.MODEL.WEIGHTS),
        "config_file": args.config_file,
        "dataset": args.dataset,
    }
    return {
        **data,
        "info": {**info, "pseudo_labels": origin},
        "categories": [*data["categories"], *categories],
        "annotations": [*data["annotations"], *numbered],
    }


if __name__ == "__main__":
    with exit_on_error():
        main()
