"""Deformable DETR against that of ``transformers``, with identical weights: time of passes and peak memory.

    python tools/benchmark_detr.py --sizes 512x512 800x1066 --batches 1 2 --turns 5

Both are the published R50 model (4 levels, 6 + 6 layers, 300 queries, 91 classes) in float32, in training mode without
dropout for forward + backward and in evaluation mode for forward alone; the trunk's first stages are frozen in both.
They take turns in one process with the same threads, so a machine that slows down slows both; printed are the ratio of
the medians (theirs / ours, above 1 is faster here) and the range over the turns. On a machine that others use, too,
--cpu-time with --threads 1 counts the work instead of the wait. Peak memory is that of a process of its own per model
and pass, above what it held with the model built.
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

from ovdet2.errors import exit_on_error
from ovdet2.layers.ms_deform_attn import describe_kernel
from ovdet2.modeling.detr.heads import ClosedSetBranch
from ovdet2.modeling.detr.import_weights import import_weights, trunk_of
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.transformer import DeformableTransformer

CLASSES = 91
PASSES = ("forward", "forward+backward")


def main(argv=None):
    """Command line; returns {(size, batch, pass): (ratio of times, our peak MiB, their peak MiB)}."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak:
        model, name, size, batch = args.peak
        print(json.dumps(peak_memory(model, name, size, int(batch), args.variant)))
        return None
    models = both_models(args.variant)
    print(f"{describe_kernel('cpu')}, {args.threads} threads, variant {args.variant}", flush=True)
    print("| image | batch | pass | theirs, s | ours, s | ratio (range) | their peak, MiB | our peak, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    results = {}
    for size in args.sizes:
        for batch in args.batches:
            for name in PASSES:
                clock = time.process_time if args.cpu_time else time.perf_counter
                times = paired_times(models, name, images_of(size, batch), args.turns, clock)
                peaks = {} if args.no_memory else {key: measured_peak(args, key, name, size, batch) for key in models}
                results[size, batch, name] = report(size, batch, name, times, peaks)
    return results


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["512x512", "800x1066"], help="height x width")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=5, help="timed turns per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="processor time of the process in place of the clock")
    parser.add_argument("--variant", default="refine", choices=("one_stage", "refine", "two_stage"))
    parser.add_argument("--no-memory", action="store_true", help="times alone")
    parser.add_argument("--peak", nargs=4, metavar=("MODEL", "PASS", "SIZE", "BATCH"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def both_models(variant):
    """{"theirs": ..., "ours": ...} with the same weights, called with images alone."""
    theirs = their_model(variant)
    weights, _ = import_weights(theirs.state_dict())
    return {"theirs": theirs, "ours": our_model(variant, weights)}


def their_model(variant):
    """The model of ``transformers`` with random weights and no dropout."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(0)
    config = DeformableDetrConfig(
        num_labels=CLASSES,
        dropout=0.0,
        with_box_refine=variant != "one_stage",
        two_stage=variant == "two_stage",
    )
    model = DeformableDetrForObjectDetection(config)
    for name, parameter in model.model.backbone.named_parameters():  # of which it freezes none for a timm trunk
        parameter.requires_grad_(any(f"layer{stage}" in name for stage in (2, 3, 4)))
    return model


def our_model(variant, weights):
    """Ours with imported weights, stem and first stage frozen as theirs."""
    transformer = DeformableTransformer(variant, dropout=0.0)
    branches = [ClosedSetBranch(256, CLASSES) for _ in range(transformer.num_branches)]
    trunk = trunk_of(weights)
    model = DeformableDETR(trunk, MultiScaleNeck([512, 1024, 2048]), transformer, branches, ["res3", "res4", "res5"])
    model.load_state_dict(weights)
    trunk.freeze(2)
    return model


def images_of(size, batch):
    """Noise [B, 3, H, W] for "HxW"."""
    height, width = map(int, size.split("x"))
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def run_pass(model, name, images):
    """One pass; the loss is the sum of squares of the last layer's logits and boxes, which is what both return."""
    if hasattr(model, "transformer"):
        sizes = [tuple(images.shape[-2:])] * len(images)

        def call():
            output = model(images, sizes)
            return output.pred_logits[-1], output.pred_boxes[-1]
    else:

        def call():
            output = model(images)
            return output.logits, output.pred_boxes

    if name == "forward":
        with torch.no_grad():
            call()
        return
    for parameter in model.parameters():
        parameter.grad = None
    sum(output.square().sum() for output in call()).backward()


def paired_times(models, name, images, turns, clock):
    """{model: seconds of every turn}; the first turn warms up and is not counted."""
    times = {key: [] for key in models}
    for model in models.values():
        model.train(name != "forward")
    for turn in range(turns + 1):
        for key in models if turn % 2 else reversed(models):
            started = clock()
            run_pass(models[key], name, images)
            if turn:
                times[key].append(clock() - started)
    return times


def measured_peak(args, model, name, size, batch):
    """MiB, from a process of its own."""
    command = [sys.executable, __file__, "--variant", args.variant, "--threads", str(args.threads)]
    command += ["--peak", model, name, size, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory(model, name, size, batch, variant):
    """MiB that two passes need beyond what the process holds with the model built (Linux, glibc)."""
    model = both_models(variant)[model].train(name != "forward")
    images = images_of(size, batch)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the other model had is given back, lest the passes live on it unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = high_water()
    for _ in range(2):
        run_pass(model, name, images)
    return high_water() - before


def high_water():
    """Peak MiB of this process; getrusage would start from that of the process it was started by."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def report(size, batch, name, times, peaks):
    """Print a row; returns (ratio of medians, our peak, their peak)."""
    theirs, ours = statistics.median(times["theirs"]), statistics.median(times["ours"])
    pairs = [t / o for t, o in zip(times["theirs"], times["ours"])]
    shown = {key: f"{peaks[key]:.0f}" if peaks else "-" for key in times}
    print(
        f"| {size} | {batch} | {name} | {theirs:.3f} | {ours:.3f} | {theirs / ours:.2f} ({min(pairs):.2f} to "
        f"{max(pairs):.2f}) | {shown['theirs']} | {shown['ours']} |",
        flush=True,
    )
    return theirs / ours, peaks.get("ours"), peaks.get("theirs")


if __name__ == "__main__":
    with exit_on_error():
        main()
