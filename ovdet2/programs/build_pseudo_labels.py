r"""Let a trained detector annotate novel classes in its training images, for a second round (CCKT-Det's Table 2).

    ovdet2 dataset pseudo-labels --config-file configs/ovcoco/cckt_r50.yaml --dataset ov_coco_train_base \
        --output datasets/coco/annotations/ov_coco_train_pseudo.json \
        MODEL.WEIGHTS model_final.pth MODEL.CCKT.PRIOR_FILE priors_of_the_training_images.safetensors

The detector is asked for all words of the data set; detections of novel words with a score from --min-score that
overlap no annotation become annotations beside the base ones ("pseudo": true, "score").

These use the names of novel classes: a detector trained on them knows what it will be asked for, and its novel AP is
not comparable with one that does not. The json says so, ovdet2 refuses it unless the data set is registered with
pseudo_labels, and the report of a detector trained on it names the words. In the second round every word counts as
base; the program prints the DATASETS.OWN for it. The figures on base and novel classes come from --eval-only with
the original test set. Exit codes as of `ovdet2 train`.
"""

from collections import Counter
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger
from torchvision.ops import box_iou, nms
from tqdm import tqdm

from ovdet2.command_line import add_config_file, add_overrides, command_parser
from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import read_coco_json
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import sha256_file, write_json


def main(argv=None):
    """Command line; returns the json that was written."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    split = split_of(args.dataset)
    if split is None or not split.novel:
        raise UsageError(f"{args.dataset} has no novel classes: name a training set of an open-vocabulary split.")
    if not cfg.MODEL.WEIGHTS:
        raise UsageError("pseudo labels come from a trained detector: give MODEL.WEIGHTS.")
    setup_logger(name="ovdet2")
    json_file, image_root = MetadataCatalog.get(args.dataset).ov_files()
    data = read_coco_json(json_file)
    boxes = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        boxes[annotation["image_id"]].append(annotation["bbox"])
    made = []
    for image_id, instances in detections(cfg, args.dataset):
        found = chosen(instances, boxes[image_id], len(split.base), args.min_score, args.overlap)
        made.extend(annotations(image_id, found, split.category_ids))
    joined = joined_json(data, made, split, args, cfg)
    write_json(args.output, joined)
    names = dict(zip(split.category_ids, split.names))
    counts = Counter(names[annotation["category_id"]] for annotation in made)
    print(f"{len(made)} pseudo labels of {len(counts)} novel classes in {args.output}, by class: {dict(counts)}")
    own = {"name": "pseudo_train", "json": str(args.output), "images": str(image_root), "base": list(split.names)}
    print(f"DATASETS.OWN of the second round, beside a test set of the same classes: {own | {'pseudo_labels': True}}")
    return joined


def parse_args(argv):
    """The command line of this program."""
    parser = command_parser("dataset pseudo-labels", __doc__)
    add_config_file(parser)
    parser.add_argument("--dataset", required=True, help="registered training set, base annotations only")
    parser.add_argument("--output", required=True, type=Path, help="json to write")
    parser.add_argument("--min-score", type=float, default=0.9, help="lowest score of a pseudo label (0.9)")
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="IoU with an annotation or a better pseudo label that excludes (0.5)"
    )
    add_overrides(parser)
    return parser.parse_args(argv)


@torch.no_grad()
def detections(cfg, dataset):
    """Yield (image id, :class:`Instances` on the CPU) of every image of a data set."""
    from ovdet2.data.loader import build_test_loader
    from ovdet2.engine import Trainer

    cfg = cfg.clone()
    cfg.DATASETS.TEST, cfg.TEST.DISTRACTORS = (dataset,), []
    model = Trainer.build_trained(cfg)
    for batch in tqdm(build_test_loader(cfg, dataset), desc="images"):
        for record, output in zip(batch, model(batch)):
            yield record["image_id"], output["instances"].to("cpu")


def chosen(instances, annotated_xywh, num_base, min_score, overlap):
    """The detections of one image that become annotations.

    Args:
        instances: :class:`Instances` in pixels of the original image.
        annotated_xywh: list of boxes (x, y, width, height) of its annotations, crowds included.
        num_base: class ids from it on are novel.
        min_score: lowest score.
        overlap: IoU with an annotation, or with a better detection, above which a detection is left out.

    Returns:
        :class:`Instances`.
    """
    boxes = instances.pred_boxes.tensor
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (instances.pred_classes >= num_base) & (instances.scores >= min_score) & (sides > 0).all(dim=1)
    if annotated_xywh:
        theirs = torch.tensor(annotated_xywh, dtype=boxes.dtype)
        theirs[:, 2:] += theirs[:, :2]
        kept &= box_iou(boxes, theirs).amax(dim=1) <= overlap
    instances = instances[kept]
    return instances[nms(instances.pred_boxes.tensor, instances.scores, overlap)]


def annotations(image_id, instances, category_ids):
    """COCO annotations without ids, marked as pseudo labels."""
    made = []
    for box, score, label in zip(
        instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()
    ):
        width, height = box[2] - box[0], box[3] - box[1]
        made.append(
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
    return made


def joined_json(data, made, split, args, cfg):
    """The training json with the pseudo labels, their categories, and what they are.

    Raises:
        DataError: the json has pseudo labels already.
    """
    info = data.get("info") if isinstance(data.get("info"), dict) else {}
    if info.get("pseudo_labels"):
        raise DataError(f"{args.dataset} has pseudo labels already: start from the annotations without them.")
    first = 1 + max((annotation["id"] for annotation in data["annotations"]), default=0)
    numbered = [{"id": first + number, **annotation} for number, annotation in enumerate(made)]
    there = {category["id"] for category in data["categories"]}
    categories = [{"id": number, "name": name} for number, name in split.novel if number not in there]
    stated = {
        "annotations": len(made),
        "words": [name for _, name in split.novel],
        "min_score": args.min_score,
        "overlap": args.overlap,
        "weights_sha256": sha256_file(cfg.MODEL.WEIGHTS),
        "config_file": args.config_file,
        "dataset": args.dataset,
    }
    return {
        **data,
        "info": {**info, "pseudo_labels": stated},
        "categories": [*data["categories"], *categories],
        "annotations": [*data["annotations"], *numbered],
    }


if __name__ == "__main__":
    with exit_on_error():
        main()
