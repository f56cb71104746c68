r"""Embed the proposals of every training image with the teacher, once, for distillation.

    python tools/build_region_cache.py --config-file configs/ovcoco/vild_text_r50.yaml \
        --dataset ov_coco_train_base --output output/ovcoco/region_cache \
        MODEL.WEIGHTS output/ovcoco/vild_text_r50/model_final.pth

The detector of --config-file, trained with boxes of base classes, proposes regions: the best --top after NMS at --nms.
Each is cut out of the original image at every scale of --scales, warped to the teacher's input and embedded; the
embeddings are summed and divided by their norm (ViLD Eq. 1). No annotation is read. The teacher is MODEL.TEACHER.

An interrupted run loses the shard it was at: the same command goes on. Exit codes as of train_net.py.
"""

import argparse
import shlex
import sys
from functools import partial

import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.layers import nms
from torch.utils.data import DataLoader
from tqdm import tqdm

from ovdet2.config import load_config
from ovdet2.data.datasets import split_of
from ovdet2.data.images import read_image
from ovdet2.data.mapper import require_annotated_size
from ovdet2.data.records import load_records
from ovdet2.data.region_cache import CacheWriter, Regions
from ovdet2.engine import AtomicCheckpointer, Trainer
from ovdet2.errors import DataError, NumericalError, UsageError, exit_on_error
from ovdet2.files import sha256_file
from ovdet2.modeling import build_teacher
from ovdet2.vlm.crops import embed_regions
from ovdet2.vlm.fingerprint import require_same_teacher
from ovdet2.vlm.teacher import state_dict_sha256
from ovdet2.vlm.templates import clean_name


def main(argv=None):
    """Command line; returns the manifest of the cache."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    cfg = detector_config(args)
    records = sorted(load_records([args.dataset], "--dataset", False, base_only=True), key=lambda r: r["image_id"])
    if split_of(args.dataset) is None:
        raise UsageError(f"{args.dataset} has no base and novel classes: name a data set registered by ovdet2.")
    teacher = build_teacher(cfg).to(cfg.MODEL.DEVICE)
    model = load_detector(cfg, args.dataset, teacher)
    writer = CacheWriter(
        args.output,
        recipe_of(args, cfg, model, teacher),
        [record["image_id"] for record in records],
        args.images_per_shard,
        "python tools/build_region_cache.py " + shlex.join(argv),
    )
    pending = writer.to_do(partial(tqdm, desc="shards found", leave=False))
    done = len(records) - sum(len(writer.shards[index]) for index in pending)
    by_id, unreadable = {record["image_id"]: record for record in records}, []
    with tqdm(total=len(records), initial=done, desc="images") as progress:
        for index in pending:
            of_shard = [by_id[image_id] for image_id in writer.shards[index]]
            regions = []
            for sample in loader_of(of_shard, cfg):
                if "fault" in sample:
                    unreadable.append(sample["fault"])
                    _require_few(unreadable, cfg)
                regions.append(no_regions(teacher) if "fault" in sample else embed_image(model, teacher, sample, args))
                progress.update()
            writer.write(index, regions)
    manifest = writer.finish()
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    print(
        f"{args.output}: {manifest['regions']} regions of {manifest['images']} images in {len(manifest['shards'])} "
        f"shards, {size:.1f} MB, teacher {teacher.fingerprint}"
    )
    if unreadable:
        print("Without regions, since they cannot be read:\n  " + "\n  ".join(unreadable))
    return manifest


def _require_few(unreadable, cfg):
    limit = cfg.DATALOADER.MAX_BAD_IMAGES  # what training tolerates, too
    if len(unreadable) > limit:
        raise DataError(
            f"{len(unreadable)} images cannot be used, DATALOADER.MAX_BAD_IMAGES is {limit}:\n  "
            + "\n  ".join(unreadable)
            + "\nMend them or raise DATALOADER.MAX_BAD_IMAGES, and go on by the same command."
        )


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="of the detector whose RPN proposes")
    parser.add_argument("--dataset", required=True, help="registered training set, base classes only")
    parser.add_argument("--output", required=True, help="folder of the cache")
    parser.add_argument("--top", type=int, default=300, help="proposals kept per image")
    parser.add_argument("--nms", type=float, default=0.7, help="IoU of the NMS over all pyramid levels before that")
    parser.add_argument("--scales", type=_numbers, default=[1.0, 1.5], help="sizes of the crops in boxes, 1.0,1.5")
    parser.add_argument("--images-per-shard", type=int, default=200)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides, such as MODEL.WEIGHTS")
    args = parser.parse_args(argv)
    if args.top < 1 or args.images_per_shard < 1 or not 0 < args.nms <= 1 or min(args.scales) <= 0:
        parser.error(
            "--top and --images-per-shard are at least 1, --nms is above 0 and at most 1, --scales are above 0"
        )
    late = [option for option in args.opts if option.startswith("--")]
    if late:
        parser.error(f"{late[0]} comes after KEY VALUE overrides: put it before them")
    return args


def _numbers(text):
    return [float(number) for number in text.split(",")]


def detector_config(args):
    """The configuration of the detector: as trained, with as many proposals as are wanted."""
    cfg = load_config(args.config_file, args.opts)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if not cfg.MODEL.WEIGHTS:
        raise UsageError("MODEL.WEIGHTS is empty: give the detector trained on base classes, MODEL.WEIGHTS <file>.")
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = max(cfg.MODEL.RPN.POST_NMS_TOPK_TEST, args.top)
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = max(cfg.MODEL.RPN.PRE_NMS_TOPK_TEST, cfg.MODEL.RPN.POST_NMS_TOPK_TEST)
    cfg.MODEL.RPN.NMS_THRESH = max(cfg.MODEL.RPN.NMS_THRESH, args.nms)  # within a level; --nms is over all of them
    cfg.freeze()
    return cfg


def load_detector(cfg, dataset, teacher):
    """The trained detector in evaluation mode.

    Raises:
        DataError: its weights cannot be read, its vocabulary is of another teacher, or it was trained with boxes of a
            class that is novel in ``dataset``: its proposals would know what must not be known.
    """
    model = Trainer.build_model(cfg).eval()
    AtomicCheckpointer(model).load_all(cfg.MODEL.WEIGHTS)
    require_same_teacher(
        model.vocabulary.vocabulary.teacher, "the detector's vocabulary", teacher.fingerprint, "MODEL.TEACHER"
    )
    if not model.vocabulary.from_checkpoint:
        raise DataError(
            f"{cfg.MODEL.WEIGHTS} does not say whose boxes it was trained with: propose with a detector that "
            "ovdet2 trained."
        )
    split = split_of(dataset)
    leaked = sorted({clean_name(name) for _, name in split.novel} & model.vocabulary.trained_base_names)
    if leaked:
        raise DataError(
            f"{cfg.MODEL.WEIGHTS} was trained with boxes of {', '.join(leaked[:5])}, novel classes of {split.name}: "
            "take proposals of a detector trained on its base classes alone."
        )
    return model


def recipe_of(args, cfg, model, teacher):
    """What decides the values of a cache; :class:`CacheWriter` and readers compare it."""
    rpn, anchors, min_size = cfg.MODEL.RPN, cfg.MODEL.ANCHOR_GENERATOR, cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE
    # Not the whole model: the words' embeddings propose nothing, and differ in their last digits between machines.
    parts = ("backbone.", "proposal_generator.")
    proposing = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(parts)}
    return {
        "teacher": teacher.fingerprint.to_dict(),
        "dim": teacher.embed_dim,
        "dataset": args.dataset,
        "dataset_sha256": sha256_file(MetadataCatalog.get(args.dataset).ov_files()[0]),
        "boxes": {
            "source": "proposals",
            "proposer_sha256": state_dict_sha256(proposing),
            "input": [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT],
            "pixels": [list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)],
            "anchors": {"sizes": anchors.SIZES, "ratios": anchors.ASPECT_RATIOS, "offset": anchors.OFFSET},
            "per_level": {"top": rpn.PRE_NMS_TOPK_TEST, "nms": rpn.NMS_THRESH, "min_size": min_size},
            "all_levels": rpn.POST_NMS_TOPK_TEST,
            "top": args.top,
            "nms": args.nms,
        },
        "crops": {"policy": "warp", "scales": args.scales, "side": teacher.image_size},
    }


class _Samples(torch.utils.data.Dataset):
    """Decodes an image once: resized for the detector, and whole for the crops."""

    def __init__(self, records, cfg):
        self.records = records
        self.bgr = cfg.INPUT.FORMAT == "BGR"
        self.resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        try:
            return self._sample(self.records[index])
        except DataError as error:
            return {"fault": str(error)}

    def _sample(self, record):
        rgb = read_image(record["file_name"], "RGB")
        require_annotated_size(record, rgb)
        height, width = rgb.shape[:2]
        resized = self.resize.get_transform(rgb).apply_image(rgb)
        image = torch.from_numpy(resized.copy()).permute(2, 0, 1)
        return {
            "image": image.flip(0) if self.bgr else image,
            "original": torch.from_numpy(rgb).permute(2, 0, 1),
            "height": height,
            "width": width,
            "file_name": record["file_name"],
        }


def loader_of(records, cfg):
    """One sample after the other, decoded by DATALOADER.NUM_WORKERS processes."""
    return DataLoader(_Samples(records, cfg), batch_size=None, num_workers=cfg.DATALOADER.NUM_WORKERS)


@torch.no_grad()
def embed_image(model, teacher, sample, args):
    """The :class:`Regions` of one image: proposals and their embeddings."""
    found = model.propose([sample])[0]
    boxes, scores = found.proposal_boxes, found.objectness_logits.float().sigmoid()
    boxes.clip((sample["height"], sample["width"]))
    inside = boxes.nonempty()
    boxes, scores = boxes.tensor[inside].float(), scores[inside]
    kept = nms(boxes, scores, args.nms)[: args.top]
    boxes, scores = boxes[kept], scores[kept]
    original = sample["original"].to(boxes.device).float() / 255
    embeddings = embed_regions(teacher, original, boxes, args.scales)
    if not torch.isfinite(embeddings).all():
        raise NumericalError(f"the teacher's embeddings of {sample['file_name']} are not finite: try another device.")
    ann_ids = torch.full((len(boxes),), -1)
    return Regions(boxes.cpu(), embeddings.cpu().half(), ann_ids, scores.cpu())


def no_regions(teacher):
    """The :class:`Regions` of an image that cannot be read."""
    empty = torch.zeros(0)
    return Regions(torch.zeros(0, 4), torch.zeros(0, teacher.embed_dim).half(), empty.long(), empty)


if __name__ == "__main__":
    with exit_on_error():
        main()
