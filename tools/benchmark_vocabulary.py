"""What more words cost at test: latency of one image for synthetic vocabularies of different sizes.

    python tools/benchmark_vocabulary.py --config-file configs/ovcoco/deformable_detr_r50.yaml --words 65 1203 21000

The detector has random weights, which cost what trained ones do; the image is noise. All vocabularies take turns in one
process, so a machine that slows down slows all. Printed is the median over the turns and its ratio to the fewest words,
with the range of the ratio.
"""

import argparse
import statistics
import time

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch.nn import functional as F

import ovdet2.modeling  # noqa: F401  registers the meta-architectures
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary


def main(argv=None):
    """Command line; returns {words: median ratio of the latency to that of the fewest words}."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, [*args.overrides, "MODEL.DEVICE", args.device])
    words = sorted(set(args.words))
    vocabularies = {count: synthetic_vocabulary(count, args.dim) for count in words}
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=vocabularies[words[0]])
    model.to(args.device).eval()
    height, width = map(int, args.size.split("x"))
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    times = {count: [] for count in words}
    for turn in range(args.turns + 1):  # the first turn warms up
        for count in words if turn % 2 else reversed(words):
            model.vocabulary.set(vocabularies[count])
            seconds = latency(model, {"image": image, "height": height, "width": width}, args.device)
            if turn:
                times[count].append(seconds)
    ratios = {}
    print(f"{args.config_file}, {height}x{width} px, {args.device}, {torch.get_num_threads()} threads", flush=True)
    for count in words:
        pairs = [many / few for many, few in zip(times[count], times[words[0]])]
        ratios[count] = statistics.median(pairs)
        print(
            f"{count} words: {statistics.median(times[count]):.3f} s, ratio {ratios[count]:.3f} ({min(pairs):.3f} to "
            f"{max(pairs):.3f})",
            flush=True,
        )
    return ratios


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="configs/ovcoco/deformable_detr_r50.yaml")
    parser.add_argument("--words", nargs="+", type=int, default=[65, 1203, 21000])
    parser.add_argument("--size", default="800x1066", help="height x width of the image")
    parser.add_argument("--dim", type=int, default=512, help="dimensions of the embedding space")
    parser.add_argument("--turns", type=int, default=5, help="timed turns")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args(argv)
    if min(args.words) < 1 or args.turns < 1:
        raise UsageError("--words and --turns are at least 1: change them.")
    return args


def synthetic_vocabulary(count, dim):
    """Random unit embeddings: their values do not change the cost."""
    rows = F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(count)), dim=1)
    names = tuple(f"word {index}" for index in range(count))
    return Vocabulary(names, torch.zeros(count, dtype=torch.bool), rows, Fingerprint("synthetic", "none"), "single")


@torch.no_grad()
def latency(model, record, device):
    """Seconds from the image to its detections."""
    started = time.perf_counter()
    model([record])
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    with exit_on_error():
        main()
