"""Trainings of a micro model in a process of their own, to which tests send signals."""

import os
import sys
import time
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from ovdet2.engine import Trainer, launch
from ovdet2.errors import exit_on_error
from tests.micro_training import micro_cfg

STEPS = 30


class Paced(HookBase):
    """States each step begun in a file, and waits in step ``wait_at`` until a file ``go`` appears."""

    def __init__(self, folder, wait_at):
        self.folder, self.wait_at = folder, wait_at

    def before_step(self):
        if self.trainer.iter == self.wait_at:
            (self.folder / "waiting").write_text(str(os.getpid()))
            while not (self.folder / "go").exists():
                time.sleep(0.01)


def options(workers):
    return ["MODEL.META_ARCHITECTURE", "NoisyMicroDetector", "SOLVER.MAX_ITER", str(STEPS), "DATASETS.TEST", "()",
            "SOLVER.STEPS", "(20,)", "DATALOADER.NUM_WORKERS", str(workers)]  # fmt: skip


def run(root, name, wait_at=-1, workers=0, resume=False, extra=()):
    """Train to the end, or until a signal; the final weights are in model_final.pth."""
    torch.set_num_threads(1)
    seed_all_rng(0 if not resume else 1)
    trainer = Trainer(micro_cfg(root / name, [*options(workers), *extra]))
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks([Paced(root, wait_at)])
    trainer.train()
    return trainer


def run_in_two(root, name, wait_at):
    """The same in two processes."""
    launch(run, 2, args=(root, name, wait_at), use_cuda=False)


class SlowEvaluation(Trainer):
    """Its evaluation never ends."""

    @classmethod
    def test(cls, *_, **__):
        (Path(os.environ["DETECTRON2_DATASETS"]) / "evaluating").touch()
        while True:
            time.sleep(0.01)


def evaluate_for_ever(root, name, period):
    torch.set_num_threads(1)
    trainer = SlowEvaluation(micro_cfg(root / name, [*options(0), "TEST.EVAL_PERIOD", str(period)]))
    trainer.resume_or_load(resume=False)
    trainer.train()


def in_process(root, output, function, *arguments):
    """Body of a process of the fork server: stderr and stdout to a file, exit codes as of a program."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["DETECTRON2_DATASETS"] = str(root)
    with exit_on_error():
        function(root, *arguments)
    sys.exit(0)
