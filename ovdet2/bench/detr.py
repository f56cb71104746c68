"""Deformable DETR against that of ``transformers``, with identical weights: time of passes and peak memory.

    ovdet2 bench detr --sizes 512x512 800x1066 --batches 1 2 --turns 5

Both are the published R50 model (4 levels, 6 + 6 layers, 300 queries, 91 classes) in float32, in training mode without
dropout for forward + backward and in evaluation mode for forward; the trunk's first stages are frozen in both. Ratios
are to ovdet2: above 1, transformers is slower.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ovdet2.bench.harness import SIZE, Benchmark, Candidate, Case, Comparison, positive, size_text
from ovdet2.layers.ms_deform_attn import describe_kernel
from ovdet2.modeling.detr.heads import ClosedSetBranch
from ovdet2.modeling.detr.import_weights import import_weights, trunk_of
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.transformer import DeformableTransformer

CLASSES = 91
PASSES = ("forward", "forward+backward")
OPTIONS = {
    "--sizes": SIZE | {"nargs": "+", "default": [(512, 512), (800, 1066)]},
    "--batches": {"nargs": "+", "type": positive, "default": [1, 2]},
    "--variant": {"default": "refine", "choices": ("one_stage", "refine", "two_stage")},
}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """Every size, batch and pass."""
    cases = [
        Case({"image": size_text(size), "batch": str(batch), "pass": name}, (name, images_of(size, batch)))
        for size in args.sizes
        for batch in args.batches
        for name in PASSES
    ]
    candidates = [
        Candidate("transformers", lambda: their_model(args.variant).to(args.device), partial(run_pass, their_outputs)),
        Candidate("ovdet2", lambda: our_model(args.variant).to(args.device), partial(run_pass, our_outputs)),
    ]
    yield Comparison(candidates, cases, "ovdet2", f"{describe_kernel(args.device)}, variant {args.variant}")


def their_model(variant: str) -> nn.Module:
    """The model of ``transformers`` with the random weights of seed 0 and no dropout."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "num_labels": CLASSES,
        "dropout": 0.0,
        "with_box_refine": variant != "one_stage",
        "two_stage": variant == "two_stage",
    }
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(**options))
    for name, parameter in model.model.backbone.named_parameters():  # transformers freezes none of a timm trunk
        parameter.requires_grad_(any(f"layer{stage}" in name for stage in (2, 3, 4)))
    return model


def our_model(variant: str) -> DeformableDETR:
    """The model of ovdet2 with the weights of :func:`their_model`, stem and first stage frozen as there."""
    weights, _ = import_weights(their_model(variant).state_dict())
    transformer = DeformableTransformer(variant, dropout=0.0)
    branches = [ClosedSetBranch(256, CLASSES) for _ in range(transformer.num_branches)]
    trunk = trunk_of(weights)
    model = DeformableDETR(trunk, MultiScaleNeck([512, 1024, 2048]), transformer, branches, ["res3", "res4", "res5"])
    model.load_state_dict(weights)
    trunk.freeze(2)
    return model


def images_of(size: tuple[int, int], batch: int) -> Tensor:
    """Noise [B, 3, H, W]."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def their_outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """The last layer's logits [B, Q, K] and boxes [B, Q, 4]."""
    outputs = model(images)
    return outputs.logits, outputs.pred_boxes


def our_outputs(model: DeformableDETR, images: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`their_outputs`."""
    outputs = model(images, [tuple(images.shape[-2:])] * len(images))
    return outputs.pred_logits[-1], outputs.pred_boxes[-1]


def run_pass(outputs_of: Callable[..., tuple[Tensor, Tensor]], model: nn.Module, inputs: tuple[str, Tensor]) -> None:
    """One pass; the loss is the sum of squares of the last layer's logits and boxes, which is what both return."""
    name, images = inputs
    images = images.to(next(model.parameters()).device)
    model.train(name != "forward")
    if name == "forward":
        with torch.no_grad():
            outputs_of(model, images)
        return
    for parameter in model.parameters():
        parameter.grad = None
    cast(Tensor, sum(output.square().sum() for output in outputs_of(model, images))).backward()


main = Benchmark("ovdet2.bench.detr", __doc__, OPTIONS, plan).main

if __name__ == "__main__":
    main()
