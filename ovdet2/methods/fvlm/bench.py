"""Time and peak memory of F-VLM's training steps, compared with the same network with a trained CLIP trunk.

    ovdet2 bench fvlm --size 800x1066 --turns 5

Both are configs/ovcoco/fvlm_rn50.yaml with equal random weights, in float32, and get the same images of 20 objects,
hence the same proposals; the learning rate is 0, so they stay equal. There is no cache of features: the frozen trunk
runs in every step. Both trunks are channels_last like a teacher. On a CPU this layout slows the gradients of the trained
one; --trained-contiguous measures without it. The time of the stages of a step and the memory of the weights are printed
as well.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

import ovdet2.data.datasets  # noqa: F401  registers OV-COCO, whose 65 words are the vocabulary
from ovdet2.bench.detectors import TrainingStep, build_detector, noise_samples, random_words
from ovdet2.bench.harness import SIZE, Benchmark, Candidate, Case, Comparison, positive, size_text
from ovdet2.bench.memory import MIB
from ovdet2.bench.turns import Clock, Elapsed
from ovdet2.command_line import OVERRIDES
from ovdet2.config import load_config
from ovdet2.modeling import dataset_split
from ovdet2.modeling.backbone.clip_pyramid import ALL_FROZEN
from ovdet2.modeling.build import build_teacher

CONFIG, CLIP = "ovcoco/fvlm_rn50.yaml", "clip.safetensors"
FREEZE_AT = {"frozen": ALL_FROZEN, "trained": 0}
STAGES = {"trunk": "backbone.trunk", "pyramid": "backbone.pyramid", "RPN": "proposal_generator", "heads": "roi_heads"}
# Images of any size, batch norms that run on the CPU too.
SETTINGS = [
    *(
        "MODEL.FPN.NORM",
        "BN",
        "MODEL.RPN.NORM",
        "BN",
        "MODEL.ROI_BOX_HEAD.NORM",
        "BN",
        "MODEL.ROI_MASK_HEAD.NORM",
        "BN",
    ),
    *("MODEL.OVD.SECONDARY_SCORES", "none", "INPUT.SQUARE", 0),
]
OPTIONS = {
    "--architecture": {"default": "RN50", "help": "open_clip ResNet or ViT"},
    "--size": SIZE | {"default": "800x1066"},
    "--batch": {"type": positive, "default": 1},
    "--trained-contiguous": {"action": "store_true", "help": "do not use channels_last for the trained trunk"},
    "opts": OVERRIDES,
}


def plan(args: argparse.Namespace) -> Iterator[Comparison]:
    """One case, two candidates."""
    if not (args.folder / CLIP).is_file():
        torch.manual_seed(0)
        weights = open_clip.create_model(args.architecture).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, args.folder / CLIP)
    clock = Clock(args.device, args.cpu_time)
    candidates = [Candidate(name, lambda name=name: StagedStep(build(name, args), clock), StagedStep.__call__)
                  for name in FREEZE_AT]  # fmt: skip
    case = Case({"image": size_text(args.size), "batch": str(args.batch)}, noise_samples(args.size, args.batch))
    yield Comparison(candidates, [case], "trained", args.architecture, print_stages)


def build(name: str, args: argparse.Namespace) -> nn.Module:
    """The detector in training mode, with random embeddings and random weights that are the same for both."""
    teacher = ["MODEL.TEACHER.ARCHITECTURE", args.architecture, "MODEL.TEACHER.PRETRAINED", str(args.folder / CLIP)]
    fixed = ["MODEL.DEVICE", args.device, "MODEL.BACKBONE.FREEZE_AT", FREEZE_AT[name], *teacher]
    cfg = load_config(CONFIG, [*fixed, *SETTINGS, *args.opts])
    split, clip = dataset_split(cfg), build_teacher(cfg)
    words = random_words(split.names, split.base_mask, clip.embed_dim, clip.fingerprint)
    model = copy.deepcopy(build_detector(cfg, words))  # the detector shares the cached teacher's trunk
    if name == "trained" and args.trained_contiguous:
        model.get_submodule(STAGES["trunk"]).to(memory_format=torch.contiguous_format)
    return model.train()


class StagedStep(TrainingStep):
    """Training step that returns {stage: seconds}."""

    def __init__(self, model: nn.Module, clock: Clock) -> None:
        super().__init__(model, momentum=0.9)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        trunk = model.get_submodule(STAGES["trunk"])
        print(f"{'trained' if any(p.requires_grad for p in trunk.parameters()) else 'frozen'}: weights "
              f"of {weights / MIB:.0f} MiB")  # fmt: skip
        self._clock, self._started, self._stages = clock, {}, {}
        for stage, path in STAGES.items():
            module = model.get_submodule(path)
            module.register_forward_pre_hook(lambda *_, stage=f"{stage} forward": self._start(stage))
            module.register_forward_hook(lambda *_, stage=f"{stage} forward": self._stop(stage))
        model.register_forward_hook(lambda *_: self._start("backward"))
        self.optimizer.register_step_pre_hook(self._before_update)
        self.optimizer.register_step_post_hook(lambda *_: self._stop("update"))

    def __call__(self, samples: Sequence[Any]) -> dict[str, float]:
        super().__call__(samples)
        return dict(self._stages)

    def _before_update(self, *_):
        self._stop("backward")
        self._start("update")

    def _start(self, stage):
        self._started[stage] = self._clock()

    def _stop(self, stage):
        self._stages[stage] = self._clock() - self._started[stage]


def print_stages(times: Mapping[str, Sequence[Elapsed]]) -> None:
    """Print the share of each stage in the median step."""
    for name, mine in times.items():
        step = statistics.median(elapsed.seconds for elapsed in mine)
        medians = {stage: statistics.median(elapsed.value[stage] for elapsed in mine) for stage in mine[0].value}
        print(f"{name}: {', '.join(f'{stage} {100 * seconds / step:.0f}%' for stage, seconds in medians.items())}")


main = Benchmark("ovdet2.methods.fvlm.bench", __doc__, OPTIONS, plan).main

if __name__ == "__main__":
    main()
