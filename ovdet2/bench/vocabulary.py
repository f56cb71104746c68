"""Latency at test for more words: one image with synthetic vocabularies of different sizes.

    ovdet2 bench vocabulary --config-file ovcoco/deformable_detr_r50.yaml --words 65 1203 21000

The detector has random weights, which take the same time as trained ones; the image is noise. Exchanging the words is
not timed.
Ratios are to the fewest words.
"""

import argparse
import functools
from collections.abc import Iterator

import torch

from ovdet2.bench.detectors import DIM, build_detector, noise_samples, random_words
from ovdet2.bench.harness import SIZE, Benchmark, Candidate, Case, Comparison, positive, size_text
from ovdet2.bench.turns import Clock, Elapsed
from ovdet2.command_line import CONFIG_FILE, OVERRIDES
from ovdet2.config import load_config

OPTIONS = {
    "--config-file": CONFIG_FILE | {"default": "ovcoco/deformable_detr_r50.yaml"},
    "--words": {"nargs": "+", "type": positive, "default": [65, 1203, 21000]},
    "--size": SIZE | {"default": "800x1066"},
    "--dim": {"type": positive, "default": DIM, "help": "dimensions of the embedding space"},
    "opts": OVERRIDES,
}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """One detector, whose words each candidate sets before it detects."""
    counts = sorted(set(args.words))
    words = {count: random_words([f"word {n}" for n in range(count)], [False] * count, args.dim) for count in counts}
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", args.device])
    detector = functools.cache(lambda: build_detector(cfg, words[counts[0]]).eval())
    clock = Clock(args.device, args.cpu_time)

    @torch.no_grad()
    def detect(count, model, samples):
        model.vocabulary.set(words[count])
        started = clock()
        model(samples)
        return Elapsed(clock() - started)

    candidates = [Candidate(f"{count} words", detector, functools.partial(detect, count)) for count in counts]
    yield Comparison(candidates, [Case({"image": size_text(args.size)}, noise_samples(args.size, objects=0))])


main = Benchmark("ovdet2.bench.vocabulary", __doc__, OPTIONS, plan, memory=False).main

if __name__ == "__main__":
    main()
