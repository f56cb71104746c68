"""Pre-train the ResNet-18 of the OV-Shapes detectors on labelled images of base classes, as ImageNet does for COCO.

    python -m ovdet2.ov_shapes.trunk --output ovdet2/assets/backbones/ovshapes_r18.safetensors

Images of one object each, with separate seeds, of base classes only; the two labels are the words of the class, its
texture and its shape. No box, no word embedding and no novel class is used. The output holds the trunk in float16 with
the names of Detectron2's ResNet, for ``MODEL.WEIGHTS: ovdet2://backbones/ovshapes_r18.safetensors``; a manifest in the
same folder states how it was made and its accuracy on held-out images.
"""

import argparse
import hashlib
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm, trange

from ovdet2.config import load_config
from ovdet2.errors import NumericalError, exit_on_error
from ovdet2.io.files import atomic_path, sha256_file, write_json
from ovdet2.ov_shapes.augment import augment
from ovdet2.ov_shapes.world.classes import BASE_NAMES, SHAPES, TEXTURES, UNSEEN_SHAPES
from ovdet2.ov_shapes.world.scenes import render_pretraining

SCHEMA = "ovdet2/embedded-backbone/1"
CONFIG = "base/ovshapes_r18.yaml"
HELD_OUT = 960
BASE_SHAPES = [shape for shape in SHAPES if shape not in UNSEEN_SHAPES]


class WordClassifier(nn.Module):
    """Trunk, global average pooling, and one linear classifier for textures and one for shapes."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.trunk = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        width = self.trunk.output_shape()["res5"].channels
        self.texture, self.shape = nn.Linear(width, len(TEXTURES)), nn.Linear(width, len(BASE_SHAPES))
        for name, value in (("mean", cfg.MODEL.PIXEL_MEAN), ("std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1) / 255.0, persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, textures] and [N, shapes] of RGB images [N, 3, H, W] in [0, 1]."""
        features = self.trunk((pixels - self.mean) / self.std)["res5"].mean(dim=(2, 3))
        return self.texture(features), self.shape(features)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    images = render_pretraining(args.seed, args.images + HELD_OUT, workers=args.threads, progress=tqdm)
    data_hash = hashlib.sha256(images.tobytes()).hexdigest()
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    labels = word_labels(len(images))
    start = time.monotonic()
    model = train(args, images[: args.images], labels[: args.images])
    seconds = time.monotonic() - start
    save(model.trunk, args.output)
    manifest = {
        "schema": SCHEMA,
        "script": "python -m ovdet2.ov_shapes.trunk",
        "config": CONFIG,
        "arguments": {key: value for key, value in sorted(vars(args).items()) if key not in ("output", "threads")},
        "images_sha256": data_hash,
        "weights_sha256": sha256_file(args.output),
        "train_seconds": round(seconds),
        "threads": args.threads,
        "held_out_accuracy_percent": accuracy(model, images[args.images :], labels[args.images :], args.side),
    }
    write_json(args.output.with_suffix(".manifest.json"), manifest, indent=1)
    print(manifest["held_out_accuracy_percent"])


def word_labels(count: int) -> torch.Tensor:
    """Indices [count, 2] of the texture and the shape of pre-training images 0..count-1."""
    words = [BASE_NAMES[index % len(BASE_NAMES)].split() for index in range(count)]
    return torch.tensor([[TEXTURES.index(texture), BASE_SHAPES.index(shape)] for texture, shape in words])


def train(args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor) -> WordClassifier:
    """Cross-entropy on both words with AdamW, linear warm-up and cosine decay.

    Args:
        args: of the command line.
        images: uint8 Tensor [N, 3, H, W], RGB.
        labels: int64 Tensor [N, 2].

    Returns:
        :class:`WordClassifier` in evaluation mode.

    Raises:
        NumericalError: the loss is not finite.
    """
    torch.manual_seed(args.seed)
    model = WordClassifier(load_config(CONFIG)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    warm_up, per_epoch = 40, len(images) // args.batch
    progress = trange(args.steps)
    order = torch.arange(0)  # of an epoch, drawn at its first step
    for step in progress:
        if step % per_epoch == 0:
            order = torch.from_numpy(np.random.default_rng((args.seed, step)).permutation(len(images)))
        chosen = order[step % per_epoch * args.batch :][: args.batch]
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / warm_up) * 0.5 * (1.0 + math.cos(math.pi * step / args.steps))
        random = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pixels = augment(images[chosen].float() / 255.0, args.side, random, coarsen=False)
        pairs = zip(model(pixels), labels[chosen].T, strict=True)
        loss = cast(torch.Tensor, sum(F.cross_entropy(logits, label) for logits, label in pairs))
        if not torch.isfinite(loss):
            raise NumericalError(f"the loss is {loss.item()} at step {step}: lower --lr.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, side: int) -> dict[str, float]:
    """Percent of images whose texture, shape, and both are classified correctly, as a dict."""
    right = []
    for pixels, label in zip(images.split(64), labels.split(64), strict=True):
        pixels = F.interpolate(pixels.float() / 255.0, size=(side, side), mode="bilinear", antialias=True)
        right.append(torch.stack([logits.argmax(dim=1) for logits in model(pixels)], dim=1) == label)
    right = torch.cat(right).float()
    named = {"texture": right[:, 0], "shape": right[:, 1], "both": right.prod(dim=1)}
    return {name: round(100.0 * values.mean().item(), 1) for name, values in named.items()}


def save(trunk: nn.Module, path: Path) -> None:
    """Write the trunk as float16; by its metadata, Detectron2 matches names by suffix, with any prefix."""
    state = {name: t.half().contiguous() for name, t in trunk.state_dict().items() if t.is_floating_point()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        save_file(state, str(temporary), metadata={"matching_heuristics": "true"})


def _parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="safetensors file")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=64, help="of the images that are trained on")
    parser.add_argument("--images", type=int, default=9600)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="changes the last digits of the result")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with exit_on_error():
        main()
