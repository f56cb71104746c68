"""What the open-vocabulary parts cost: training steps of the ViLD family against Detectron2's Faster R-CNN.

    python tools/benchmark_step.py --sizes 800x1066 512x512 224x224 --steps 8

All models have the same R50-FPN and head weights and get the same image of 20 objects, hence the same proposals (512
regions are sampled where there are as many). ViLD and ViLD-ensemble distil 300 cached regions as well. The models take
turns in one process, so a machine that slows down slows all. Prints the median ratio over the turns, and its range.
"""

import argparse
import statistics
import time

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

import ovdet2.data.datasets  # noqa: F401  registers OV-COCO, whose 65 words are the vocabulary
from ovdet2.config import load_config
from ovdet2.errors import exit_on_error
from ovdet2.modeling import OpenVocabularyRCNN, OpenVocabularyROIHeads, dataset_split
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank

VARIANTS = {
    "ViLD-text": "ovcoco/vild_text_r50.yaml",
    "ViLD": "ovcoco/vild_r50.yaml",
    "ViLD-ensemble": "ovcoco/vild_ensemble_r50.yaml",
}
REGIONS, DIM = 300, 512


def main(argv=None):
    """Command line; returns {(size, model): median ratio}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["800x1066", "512x512", "224x224"], help="height x width")
    parser.add_argument("--steps", type=int, default=8, help="timed turns per size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    plain = load_config("ovcoco/vild_text_r50.yaml", ["MODEL.DEVICE", args.device])
    models = {"Faster R-CNN": plain_model(plain)}
    for name, config in VARIANTS.items():
        models[name] = open_vocabulary_model(load_config(config, ["MODEL.DEVICE", args.device]))
        # Equal weights that stay as they are: other proposals would mean another number of regions, hence another cost.
        models[name].load_state_dict(models["Faster R-CNN"].state_dict(), strict=False)
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.0) for name, model in models.items()}
    ratios = {}
    for size in args.sizes:
        record = make_record(*map(int, size.split("x")))
        times = {name: [] for name in models}
        for turn in range(args.steps + 1):  # the first turn warms up
            for name in models if turn % 2 else reversed(models):
                seconds = timed_step(models[name], optimizers[name], record, args.device)
                if turn:
                    times[name].append(seconds)
        for name in VARIANTS:
            pairs = [ours / plain for ours, plain in zip(times[name], times["Faster R-CNN"])]
            ratios[size, name] = statistics.median(pairs)
            print(
                f"{size} {name}: ratio {ratios[size, name]:.3f} ({min(pairs):.3f} to {max(pairs):.3f}), medians "
                f"{statistics.median(times[name]):.3f} s and {statistics.median(times['Faster R-CNN']):.3f} s",
                flush=True,
            )
    return ratios


def open_vocabulary_model(cfg):
    """The model of ``cfg`` with made-up embeddings of the right shape: their values do not change the cost."""
    split = dataset_split(cfg)
    rows = F.normalize(torch.randn(len(split.names), DIM), dim=1)
    words = WordBank(Vocabulary(split.names, split.base_mask, rows, Fingerprint("ViT-B-32", "openai"), "single"))
    plain = plain_model(cfg)
    return (
        OpenVocabularyRCNN(
            backbone=plain.backbone,
            proposal_generator=plain.proposal_generator,
            roi_heads=OpenVocabularyROIHeads(cfg, plain.backbone.output_shape(), words),
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            input_format=cfg.INPUT.FORMAT,
        )
        .to(cfg.MODEL.DEVICE)
        .train()
    )


def plain_model(cfg):
    """Detectron2's Faster R-CNN with the same trunk, pyramid, RPN, box head and 48 closed classes."""
    cfg = cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 48
    return build_model(cfg).train()


def make_record(height, width, objects=20):
    """One image of noise with boxes spread over it."""
    generator = torch.Generator().manual_seed(0)
    target = Instances((height, width))
    corners = torch.rand(objects, 2, generator=generator) * 0.7 * torch.tensor([width, height])
    target.gt_boxes = Boxes(torch.cat([corners, corners + 0.25 * torch.tensor([width, height])], dim=1))
    target.gt_classes = torch.arange(objects)
    pixels = (torch.rand(3, height, width, generator=generator) * 255).to(torch.uint8)
    regions = Instances((height, width))
    corners = torch.rand(REGIONS, 2, generator=generator) * 0.7 * torch.tensor([width, height])
    sides = (0.05 + 0.25 * torch.rand(REGIONS, 2, generator=generator)) * torch.tensor([width, height])
    regions.proposal_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    regions.embeddings = F.normalize(torch.randn(REGIONS, DIM, generator=generator), dim=1).half()
    return {"image": pixels, "height": height, "width": width, "instances": target, "regions": regions}


def timed_step(model, optimizer, record, device):
    """Seconds of forward, backward and update on a batch of one image."""
    started = time.perf_counter()
    torch.manual_seed(0)
    with EventStorage():
        loss = sum(model([record]).values())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    with exit_on_error():
        main()
