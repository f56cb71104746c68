r"""Training steps of CLIP-DETR: with AlignNet, with dynamic queries and with both, against the detector alone.

    python tools/benchmark_clip_detr.py --config-file configs/ovshapes/clip_detr_both_closed_r18.yaml \
        --size 160x160 --batch 8 --objects 4 --turns 10
    python tools/benchmark_clip_detr.py --config-file configs/coco/clip_detr_r50_12ep.yaml \
        --size 512x512 --batch 1 --objects 7 --turns 3

All have the same weights and get the same images of noise; a step is forward, backward and an update of size 0. They
take turns in one process, so a machine that slows down slows all; printed are the median over the turns of the ratio to
the detector alone, its range, and peak memory of a step: of a process of its own for each above what it held with the
model built, on a GPU what was allocated. On a machine that others use, too, --cpu-time with --threads 1 counts the work
instead of the wait. At test there is no difference to measure: the parts are not run.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from benchmark_detr import high_water
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

import ovdet2.modeling  # noqa: F401  registers the detectors
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary

ALIGN, DYNAMIC = "MODEL.CLIP_DETR.ALIGN_WEIGHT", "MODEL.CLIP_DETR.DYNAMIC_WEIGHT"
PARTS = {
    "detector alone": [ALIGN, 0.0, DYNAMIC, 0.0],
    "AlignNet": [ALIGN, 1.0, DYNAMIC, 0.0],
    "dynamic queries": [ALIGN, 0.0, DYNAMIC, 1.0],
    "both": [ALIGN, 1.0, DYNAMIC, 1.0],
}
WORDS, DIM = 80, 512


def main(argv=None):
    """Command line; returns {parts: (median ratio, peak MiB or None)}."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    records = make_records(args.size, args.batch, args.objects)
    if args.peak:
        print(json.dumps(peak_memory(build(args, args.peak), records, args.device)))
        return None
    models = {name: build(args, name) for name in PARTS}
    for model in models.values():
        model.load_state_dict(models["detector alone"].state_dict(), strict=False)
    times = paired_times(models, records, args)
    print(
        f"{args.config_file}: {args.batch} images of {args.size}, {args.objects} objects each, {args.threads} threads"
    )
    print("| parts | step, s | ratio (range) | peak, MiB |\n|---|---|---|---|")
    results = {}
    for name, seconds in times.items():
        ratios = [mine / alone for mine, alone in zip(seconds, times["detector alone"])]
        peak = None if args.no_memory else measured_peak(name, sys.argv[1:] if argv is None else argv)
        results[name] = statistics.median(ratios), peak
        shown = "-" if peak is None else f"{peak:.0f}"
        print(
            f"| {name} | {statistics.median(seconds):.3f} | {results[name][0]:.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {shown} |",
            flush=True,
        )
    return results


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="configs/ovshapes/clip_detr_both_closed_r18.yaml")
    parser.add_argument("--size", default="160x160", help="height x width of the images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--objects", type=int, default=4, help="of each image")
    parser.add_argument("--turns", type=int, default=10, help="timed turns; one more warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of the process in place of the clock")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--peak", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="KEY VALUE ...")
    args = parser.parse_args(argv)
    if min(args.batch, args.turns) < 1 or args.objects < 0:
        raise UsageError("--batch and --turns are at least 1, --objects at least 0: change them.")
    return args


def build(args, name):
    """The detector of the configuration with some of the parts, random weights, and words of random embeddings."""
    fixed = ["MODEL.DEVICE", args.device, "MODEL.CLIP_DETR.LABEL_TABLE", "", "MODEL.WEIGHTS", ""]
    cfg = load_config(args.config_file, [*args.overrides, *fixed, *PARTS[name]])
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(WORDS, DIM), dim=1)
    names, base = [f"word {number}" for number in range(WORDS)], [True] * WORDS
    words = Vocabulary(names, base, rows, Fingerprint("none", "random"), "single")
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=words)
    return model.to(args.device).train()


def make_records(size, batch, objects):
    """Images of noise with boxes spread over them."""
    height, width = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    records = []
    for _ in range(batch):
        target = Instances((height, width))
        sides = torch.tensor([width, height])
        corners = torch.rand(objects, 2, generator=generator) * 0.7 * sides
        target.gt_boxes = Boxes(torch.cat([corners, corners + 0.25 * sides], dim=1))
        target.gt_classes = torch.arange(objects) % WORDS
        pixels = (torch.rand(3, height, width, generator=generator) * 255).to(torch.uint8)
        records.append({"image": pixels, "height": height, "width": width, "instances": target})
    return records


def step(model, optimizer, records):
    """One training step; the optimizer's rate is 0, so that all models stay alike."""
    loss = sum(model(records).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if loss.is_cuda:
        torch.cuda.synchronize()


def paired_times(models, records, args):
    """{parts: seconds of every turn}; the first turn warms up and is not counted."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    optimizers = {name: torch.optim.AdamW(trained(model), lr=0.0, foreach=True) for name, model in models.items()}
    times = {name: [] for name in models}
    for turn in range(args.turns + 1):
        for name in models if turn % 2 else reversed(models):
            started = clock()
            step(models[name], optimizers[name], records)
            if turn:
                times[name].append(clock() - started)
    return times


def trained(model):
    """The parameters that have gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def measured_peak(name, argv):
    """MiB, from a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", name, *map(str, argv)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory(model, records, device):
    """MiB that two steps need beyond what is held with the model built (on the CPU: Linux, glibc)."""
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
        before = high_water()
    for _ in range(2):
        step(model, optimizer, records)
    if device.startswith("cuda"):
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return high_water() - before


if __name__ == "__main__":
    with exit_on_error():
        main()
