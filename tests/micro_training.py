"""A detector of a few hundred weights, its data set, and what tests run in several processes."""

import json
import os
import signal

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch import nn

import train_net
from ovdet2.config import get_cfg
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import data_root, register_dataset
from ovdet2.data.samples import BOXES, CAPTIONS, of_kind
from ovdet2.errors import DataError
from ovdet2.io.files import write_safetensors

SPLIT = Split("micro", base=((1, "disc"), (2, "bar")), novel=((5, "ring"),))
for _part in ("train", "val"):
    # Below DETECTRON2_DATASETS, which each test sets.
    register_dataset(f"ov_micro_{_part}", f"micro/{_part}.json", "micro/images", SPLIT)


def captioned():
    """Records of the same images with captions of one to three words."""
    folder = data_root() / "micro" / "images"
    return [
        {"file_name": str(folder / f"{number:04d}.png"), "image_id": number, "captions": ("word " * (1 + number % 3),)}
        for number in range(1, 13)
    ]


DatasetCatalog.register("micro_captioned", captioned)
MetadataCatalog.get("micro_captioned").set(ov_kind=CAPTIONS)


def write_data(root, images=12):
    """Write images of 48x64 and 64x48 pixels with one or two boxes each, and the two jsons."""
    rng = np.random.default_rng(0)
    folder = root / "micro" / "images"
    folder.mkdir(parents=True)
    records, boxes = [], []
    for number in range(1, images + 1):
        height, width = (48, 64) if number % 3 else (64, 48)
        name = f"{number:04d}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / name)
        records.append({"id": number, "file_name": name, "height": height, "width": width})
        for category_id in (1 + number % 2, 5)[: 1 + number % 2]:
            x, y = rng.integers(0, 20, 2).tolist()
            box = {"id": len(boxes) + 1, "image_id": number, "category_id": category_id}
            boxes.append({**box, "bbox": [x, y, 20, 16], "area": 320, "iscrowd": 0})
    categories = [{"id": i, "name": n} for i, n in zip(SPLIT.category_ids, SPLIT.names)]
    for part in ("train", "val"):
        kept = [box for box in boxes if part == "val" or box["category_id"] in (1, 2)]
        data = {"images": records, "annotations": kept, "categories": categories}
        (root / "micro" / f"{part}.json").write_text(json.dumps(data))


def micro_cfg(output, overrides=()):
    """Configuration of the micro run; batch of 4, two workers off, no periodic checkpoint but at the end."""
    cfg = get_cfg()
    cfg.merge_from_list(micro_opts(output))
    cfg.merge_from_list(list(overrides))
    cfg.freeze()
    return cfg


def micro_opts(output):
    """The same as KEY VALUE arguments."""
    return [
        "MODEL.META_ARCHITECTURE", "MicroDetector", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output), "SEED", "7",
        "DATASETS.TRAIN", "('ov_micro_train',)", "DATASETS.TEST", "('ov_micro_val',)", "DATALOADER.NUM_WORKERS", "0",
        "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "6", "SOLVER.BASE_LR", "0.01", "SOLVER.WARMUP_ITERS", "3",
        "SOLVER.CHECKPOINT_PERIOD", "0", "INPUT.MIN_SIZE_TRAIN", "(32, 40, 48)", "INPUT.MIN_SIZE_TEST", "48",
        "TEST.HTML_REPORT", "False",  # drawing takes longer than such a run
    ]  # fmt: skip


@META_ARCH_REGISTRY.register()
class MicroDetector(nn.Module):
    """One box and one class per image from average features; its loss is a mean over images."""

    noise = 0.0

    def __init__(self, cfg):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=4)
        self.head = nn.Linear(6, 4 + len(SPLIT.names))
        self.seen = []  # image ids of each training batch

    def forward(self, batch):
        features = torch.stack([self._features(record["image"]) for record in batch])
        if self.noise:
            noise = self.noise * torch.rand_like(features) * np.random.rand()
            features = features + noise * self.training
        boxes, logits = self.head(features).split([4, len(SPLIT.names)], dim=1)
        if not self.training:
            return [self._result(record, box, row) for record, box, row in zip(batch, boxes, logits)]
        self.seen.append([record["image_id"] for record in batch])
        gt_boxes = torch.stack([record["instances"].gt_boxes.tensor[0] for record in batch]) / 64
        gt_classes = torch.stack([record["instances"].gt_classes[0] for record in batch])
        return {
            "loss_box": (boxes - gt_boxes).abs().sum(dim=1).mean(),
            "loss_cls": nn.functional.cross_entropy(logits, gt_classes),
        }

    def _features(self, image):
        return self.stem(image[None].float() / 255).relu().mean(dim=(2, 3))[0]

    def _result(self, record, box, row):
        size = record["height"], record["width"]
        corner = box[:2].abs() * 20
        result = Instances(size)
        result.pred_boxes = Boxes(torch.cat([corner, corner + 18])[None].repeat(len(row), 1))
        result.scores, result.pred_classes = row.softmax(dim=0), torch.arange(len(row))
        return {"instances": result}


@META_ARCH_REGISTRY.register()
class NoisyMicroDetector(MicroDetector):
    """Draws from torch's and numpy's generators, in training to some effect, as proposal sampling does."""

    noise = 0.5


@META_ARCH_REGISTRY.register()
class CaptionedMicroDetector(NoisyMicroDetector):
    """Learns the number of words of captions, too; a step has images with boxes, with captions, or both."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.words = nn.Linear(6, 1)

    def forward(self, batch):
        if not self.training:
            return super().forward(batch)
        boxes, captions = of_kind(batch, BOXES), of_kind(batch, CAPTIONS)
        losses = super().forward(boxes) if boxes else {}
        if captions:
            self.seen.append([-sample.image_id for sample in captions])
            counts = torch.tensor([[len(sample.captions[0].split())] for sample in captions])
            features = torch.stack([self._features(sample.image) for sample in captions])
            losses["loss_words"] = (self.words(features) - counts).abs().mean()
        return losses


@META_ARCH_REGISTRY.register()
class ExplodingMicroDetector(MicroDetector):
    """Its loss is NaN in the last process from the third step on."""

    def forward(self, batch):
        losses = super().forward(batch)
        if self.training and len(self.seen) >= 3 and comm.get_rank() == comm.get_world_size() - 1:
            losses["loss_box"] = losses["loss_box"] * float("nan")
        return losses


@META_ARCH_REGISTRY.register()
class InfiniteGradientMicroDetector(MicroDetector):
    """A finite loss whose gradient is not: the square root at zero."""

    def forward(self, batch):
        losses = super().forward(batch)
        if self.training and len(self.seen) >= 3:
            losses["loss_root"] = (self.head.weight * 0).sum().sqrt()
        return losses


@META_ARCH_REGISTRY.register()
class BatchNormMicroDetector(MicroDetector):
    """Its normalisation follows the images, hence differs from process to process."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.stem = nn.Sequential(self.stem, nn.BatchNorm2d(6))


class BufferRecorder(HookBase):
    """Keeps the model's buffers as they are after each step, by iteration."""

    def __init__(self):
        self.buffers = {}

    def after_step(self):
        model = self.trainer.checkpointer.model
        self.buffers[self.trainer.iter] = {name: buffer.clone() for name, buffer in model.named_buffers()}


def batch_norm_check(folder):
    """In each process: buffers before and after an evaluation (iteration 1) and the last checkpoint (iteration 2)."""
    from ovdet2.engine import Trainer

    seed_all_rng(0)
    options = ["MODEL.META_ARCHITECTURE", "BatchNormMicroDetector", "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "2"]
    trainer = Trainer(micro_cfg(folder, options))
    trainer.resume_or_load(resume=False)
    before, after = BufferRecorder(), BufferRecorder()
    trainer.register_hooks([before, after])
    trainer._hooks.insert(0, trainer._hooks.pop(-2))
    trainer.train()
    tensors = {
        f"{when}.{iteration}.{name}": buffer
        for when, recorder in (("before", before), ("after", after))
        for iteration in (1, 2)
        for name, buffer in recorder.buffers[iteration].items()
    }
    write_safetensors(folder / f"rank{comm.get_rank()}.safetensors", tensors, {"schema": "test"})


def parallel_check(folder):
    """In each process: gradients of one step, weights after a run, and its evaluation, written to ``folder``."""
    from ovdet2.engine import Trainer

    seed_all_rng(comm.get_rank())
    trainer = Trainer(micro_cfg(folder, ["DATALOADER.ASPECT_RATIO_GROUPING", "False"]))
    trainer.resume_or_load(resume=False)
    gradients = []

    def before_step(*_):
        gradients.append({name: p.grad.clone() for name, p in trainer.checkpointer.model.named_parameters()})

    trainer.optimizer.register_step_pre_hook(before_step)
    trainer.train()
    model = trainer.checkpointer.model
    tensors = {f"weight.{name}": p for name, p in model.named_parameters()}
    tensors.update((f"gradient.{name}", g) for name, g in gradients[0].items())
    tensors["seen"] = torch.tensor(model.seen)
    write_safetensors(folder / f"rank{comm.get_rank()}.safetensors", tensors, {"schema": "test"})


def mixed_run(folder, mix, steps, resume):
    """In each process: a run with boxes and captions up to a number of steps; weights and seen images to ``folder``."""
    from ovdet2.engine import Trainer

    seed_all_rng(comm.get_rank() + 10 * resume)
    sources = [{"name": "micro_captioned", "images": 2, "min_size": [32, 64], "ratio": 2.0}]
    options = ["MODEL.META_ARCHITECTURE", "CaptionedMicroDetector", "DATASETS.SOURCES", sources, "DATALOADER.MIX", mix]
    options += ["SOLVER.MAX_ITER", "9", "SOLVER.CHECKPOINT_PERIOD", "4", "DATASETS.TEST", "()"]
    trainer = Trainer(micro_cfg(folder, options))
    trainer.resume_or_load(resume=resume)
    trainer.max_iter = steps
    trainer.train()
    model = trainer.checkpointer.model
    tensors = {f"weight.{name}": parameter for name, parameter in model.named_parameters()}
    tensors["seen"] = torch.tensor([image_id for batch in model.seen for image_id in batch])
    write_safetensors(folder / f"rank{comm.get_rank()}.safetensors", tensors, {"schema": "test"})


def main(args):
    """One process of train_net, where this module's models are registered."""
    return train_net.main(args)


def fail_while_the_other_waits(began, how):
    """Process 1 fails; process 0 waits for it in a collective operation."""
    if comm.get_rank() == 1:
        began.touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("image 7 is damaged")
    comm.synchronize()
