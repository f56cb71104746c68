r"""Time of training steps with AlignNet, with dynamic queries and with both, compared with the detector without.

    ovdet2 bench clip-detr --config-file ovshapes/clip_detr_both_closed_r18.yaml \
        --size 160x160 --batch 8 --objects 4 --turns 10
    ovdet2 bench clip-detr --config-file coco/clip_detr_r50_12ep.yaml \
        --size 512x512 --batch 1 --objects 7 --turns 3

All have the same weights and get the same noise images; a step is forward, backward and an update with learning rate 0.
At test there is no difference: the parts do not run.
"""

import argparse
from collections.abc import Iterator

import torch

from ovdet2.bench.detectors import TrainingStep, build_detector, noise_samples, random_words
from ovdet2.bench.harness import SIZE, Benchmark, Candidate, Case, Comparison, positive, size_text
from ovdet2.command_line import CONFIG_FILE, OVERRIDES
from ovdet2.config import load_config

ALIGN, DYNAMIC = "MODEL.CLIP_DETR.ALIGN_WEIGHT", "MODEL.CLIP_DETR.DYNAMIC_WEIGHT"
ALONE = "detector"
PARTS = {
    ALONE: [ALIGN, 0.0, DYNAMIC, 0.0],
    "AlignNet": [ALIGN, 1.0, DYNAMIC, 0.0],
    "dynamic queries": [ALIGN, 0.0, DYNAMIC, 1.0],
    "both": [ALIGN, 1.0, DYNAMIC, 1.0],
}
WORDS = [f"word {number}" for number in range(80)]
OPTIONS = {
    "--config-file": CONFIG_FILE | {"default": "ovshapes/clip_detr_both_closed_r18.yaml"},
    "--size": SIZE | {"default": "160x160"},
    "--batch": {"type": positive, "default": 8},
    "--objects": {"type": int, "choices": range(len(WORDS) + 1), "default": 4, "metavar": "N", "help": "of each image"},
    "opts": OVERRIDES,
}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """One case, with a candidate for each combination of parts."""
    columns = {"image": size_text(args.size), "batch": str(args.batch), "objects": str(args.objects)}
    candidates = [Candidate(name, lambda name=name: build(args, name), TrainingStep.__call__) for name in PARTS]
    case = Case(columns, noise_samples(args.size, args.batch, args.objects))
    yield Comparison(candidates, [case], title=args.config_file)


def build(args: argparse.Namespace, name: str) -> TrainingStep:
    """Training step with some of the parts; they are built last, so the detector's weights are the same for all."""
    fixed = ["MODEL.DEVICE", args.device, "MODEL.CLIP_DETR.LABEL_TABLE", "", "MODEL.WEIGHTS", ""]
    cfg = load_config(args.config_file, [*args.opts, *fixed, *PARTS[name]])
    words = random_words(WORDS, [True] * len(WORDS))
    return TrainingStep(build_detector(cfg, words), torch.optim.AdamW, foreach=True)


main = Benchmark("ovdet2.methods.clip_detr.bench", __doc__, OPTIONS, plan, turns=10).main

if __name__ == "__main__":
    main()
