"""What more words cost at test: latency of one image for synthetic vocabularies of different sizes.

    python -m ovdet2.bench.vocabulary --config-file configs/ovcoco/deformable_detr_r50.yaml --words 65 1203 21000

The detector has random weights, which cost what trained ones do; the image is noise. Exchanging the words is not timed.
Ratios are to the fewest words.
"""

import argparse
import functools
from collections.abc import Iterator

import torch

from ovdet2.bench.detectors import (
    DIM,
    build_detector,
    noise_samples,
    random_words,
    require_positive,
    size_of,
    size_text,
)
from ovdet2.bench.harness import Benchmark, Candidate, Case, Comparison
from ovdet2.bench.turns import Clock, Elapsed
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--config-file", default="configs/ovcoco/deformable_detr_r50.yaml")
    parser.add_argument("--words", nargs="+", type=int, default=[65, 1203, 21000])
    parser.add_argument("--size", type=size_of, default="800x1066", help="height x width of the image")
    parser.add_argument("--dim", type=int, default=DIM, help="dimensions of the embedding space")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="KEY VALUE ...")


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """One detector, whose words each candidate sets before it detects."""
    require_positive(args, "dim")
    if min(args.words) < 1:
        raise UsageError(f"--words {min(args.words)}: a vocabulary has at least 1 word.")
    counts = sorted(set(args.words))
    words = {count: random_words([f"word {n}" for n in range(count)], [False] * count, args.dim) for count in counts}
    cfg = load_config(args.config_file, [*args.overrides, "MODEL.DEVICE", args.device])
    detector = functools.cache(lambda: build_detector(cfg, words[counts[0]]).eval())
    clock = Clock(args.device, args.cpu_time)

    @torch.no_grad()
    def detect(count, model, samples):
        model.vocabulary.set(words[count])
        started = clock()
        model(samples)
        return Elapsed(clock() - started)

    candidates = [Candidate(f"{count} words", detector, functools.partial(detect, count)) for count in counts]
    case = Case({"image": size_text(args.size)}, noise_samples(args.size, objects=0))
    yield Comparison(candidates, [case], title=args.config_file)


BENCHMARK = Benchmark("ovdet2.bench.vocabulary", __doc__, add_arguments, plan, memory=False)
main = BENCHMARK.main

if __name__ == "__main__":
    with exit_on_error():
        main()
