"""Training: processes, checkpoints, the trainer."""

from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.engine.launch import launch, torchrun_rank
from ovdet2.engine.start import scaled, setup
from ovdet2.engine.trainer import Trainer

__all__ = ["AtomicCheckpointer", "Trainer", "launch", "scaled", "setup", "torchrun_rank"]
