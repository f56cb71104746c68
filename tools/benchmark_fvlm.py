"""What freezing the trunk of F-VLM saves: training steps and peak memory against the same network with CLIP trained.

    python tools/benchmark_fvlm.py --size 800x1066 --turns 5

Both are configs/ovcoco/fvlm_rn50.yaml with equal random weights, in float32, and get the same image of 20 objects,
hence the same proposals; the learning rate is 0, so they stay equal. They take turns in one process, so a machine that
slows down slows both; --cpu-time with --threads 1 counts the work instead of the wait. There is no cache of features:
the frozen trunk runs in every step. Both trunks are channels_last as a teacher is; on a CPU that slows the gradients of
the trained one, and --trained-contiguous measures against one without that handicap. Printed are the median ratio
(frozen / trained) and its range, where a step's time goes, and peak memory: weights, and what the steps need above them
(on a CPU that of a process of its own per model).
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

import open_clip
import torch
from benchmark_detr import high_water
from benchmark_step import make_record
from detectron2.modeling import build_proposal_generator
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

import ovdet2.data.datasets  # noqa: F401  registers OV-COCO, whose 65 words are the vocabulary
from ovdet2.config import load_config
from ovdet2.errors import exit_on_error
from ovdet2.modeling import FrozenVLMRCNN, OpenVocabularyROIHeads, dataset_split
from ovdet2.modeling.backbone.clip_pyramid import ALL_FROZEN, clip_pyramid
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank

CONFIG = "ovcoco/fvlm_rn50.yaml"
FREEZE_AT = {"frozen": ALL_FROZEN, "trained": 0}
PARTS = {"trunk": "backbone.trunk", "pyramid": "backbone.pyramid", "RPN": "proposal_generator", "heads": "roi_heads"}
MIB = 2**20


def main(argv=None):
    """Command line; returns {"time": median ratio, "memory": ratio of peaks}, frozen / trained."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak:
        print(json.dumps(peak_on_cpu(args.peak, args)))
        return None
    record = make_record(*map(int, args.size.split("x")))
    clock = time.process_time if args.cpu_time else time.perf_counter
    runs = {name: Run(build(name, args), args.device, clock) for name in FREEZE_AT}
    for turn in range(args.turns + 1):  # the first turn warms up
        for name in runs if turn % 2 else reversed(runs):
            runs[name].step([record] * args.batch, keep=turn > 0)
    ratios = [a["step"] / b["step"] for a, b in zip(runs["frozen"].times, runs["trained"].times)]
    ratio = statistics.median(ratios)
    print(f"{args.architecture}, {args.size}, batch {args.batch}, {args.device}, {args.threads} threads")
    print(f"step: ratio {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), frozen / trained")
    for name, run in runs.items():
        print(f"{name}: {run.summary()}")
    del runs
    peaks = {name: measured_peak(name, args) for name in FREEZE_AT}
    for name, (weights, above) in peaks.items():
        print(f"{name}: peak {weights + above:.0f} MiB, of which weights {weights:.0f} and steps {above:.0f}")
    memory = sum(peaks["frozen"]) / sum(peaks["trained"])
    print(f"peak memory: ratio {memory:.3f}, without weights {peaks['frozen'][1] / peaks['trained'][1]:.3f}")
    return {"time": ratio, "memory": memory}


def parse_args(argv):
    """The command line of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="RN50", help="open_clip ResNet or ViT")
    parser.add_argument("--size", default="800x1066", help="height x width")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5, help="timed turns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--trained-contiguous", action="store_true", help="do not give the trained trunk channels_last")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of the process in place of the clock")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", choices=list(FREEZE_AT), help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides of the configuration")
    return parser.parse_args(argv)


def build(name, args):
    """The detector in training mode, with random weights that are the same for both; embeddings are made up."""
    cfg = load_config(CONFIG, ["MODEL.DEVICE", args.device, "MODEL.BACKBONE.FREEZE_AT", FREEZE_AT[name]])
    cfg.merge_from_list(["MODEL.FPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.OVD.SECONDARY_SCORES", "none"])
    cfg.merge_from_list(args.opts)
    torch.manual_seed(0)
    visual = open_clip.create_model(args.architecture).visual
    if name == "frozen" or not args.trained_contiguous:
        visual.to(memory_format=torch.channels_last)
    backbone = clip_pyramid(cfg, visual)
    shapes, split = backbone.output_shape(), dataset_split(cfg)
    rows = F.normalize(torch.randn(len(split.names) + 1, visual.output_dim), dim=1)
    teacher = Fingerprint(args.architecture, "random")
    words = WordBank(Vocabulary(split.names, split.base_mask, rows[:-1], teacher, "single"), rows[-1])
    return (
        FrozenVLMRCNN(
            backbone=backbone,
            proposal_generator=build_proposal_generator(cfg, shapes),
            roi_heads=OpenVocabularyROIHeads(cfg, shapes, words),
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            input_format=cfg.INPUT.FORMAT,
        )
        .to(args.device)
        .train()
    )


class Run:
    """Steps of one model and where their time goes."""

    def __init__(self, model, device, clock):
        self.model, self.device, self.clock = model, device, clock
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)
        self.times = []
        self._parts, self._started = {}, {}
        for part, path in PARTS.items():
            module = model.get_submodule(path)
            module.register_forward_pre_hook(lambda *_, part=part: self._started.update({part: self.now()}))
            module.register_forward_hook(lambda *_, part=part: self._stop(part))

    def _stop(self, part):
        self._parts[part] = self.now() - self._started[part]

    def now(self):
        """Seconds, once the device has done what it was asked."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return self.clock()

    def step(self, records, keep=True):
        """Forward, backward, update."""
        torch.manual_seed(0)
        started = self.now()
        with EventStorage():
            loss = sum(self.model(records).values())
        forward = self.now()
        self.optimizer.zero_grad()
        loss.backward()
        backward = self.now()
        self.optimizer.step()
        ended = self.now()
        if keep:
            parts = {f"{part} forward": seconds for part, seconds in self._parts.items()}
            rest = {"backward": backward - forward, "update": ended - backward, "step": ended - started}
            self.times.append(parts | rest)

    def summary(self):
        """Median of the step and the medians' shares of it, one line."""
        medians = {part: statistics.median(times[part] for times in self.times) for part in self.times[0]}
        whole = medians.pop("step")
        shares = ", ".join(f"{part} {100 * seconds / whole:.0f}%" for part, seconds in medians.items())
        return f"median {whole:.3f} s: {shares}"


def measured_peak(name, args):
    """(MiB of weights, MiB that steps need above them)."""
    if args.device.startswith("cuda"):
        return peak_on_cuda(name, args)
    command = [sys.executable, __file__, "--peak", name, "--size", args.size, "--batch", str(args.batch)]
    command += ["--architecture", args.architecture, "--threads", str(args.threads), "--device", args.device]
    command += ["--trained-contiguous"] * args.trained_contiguous + args.opts
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(json.loads(done.stdout.strip().splitlines()[-1]))


def peak_on_cuda(name, args):
    """As of the allocator."""
    gc.collect()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    run = Run(build(name, args), args.device, time.perf_counter)
    weights = torch.cuda.memory_allocated() - base
    torch.cuda.reset_peak_memory_stats()
    steps_of(run, args)
    return weights / MIB, (torch.cuda.max_memory_allocated() - base - weights) / MIB


def peak_on_cpu(name, args):
    """As of this process (Linux, glibc)."""
    run = Run(build(name, args), args.device, time.perf_counter)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in run.model.state_dict().values())
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = high_water()
    steps_of(run, args)
    return weights / MIB, high_water() - before


def steps_of(run, args):
    """Two steps: the second has what the optimizer keeps."""
    for _ in range(2):
        run.step([make_record(*map(int, args.size.split("x")))] * args.batch)


if __name__ == "__main__":
    with exit_on_error():
        main()
