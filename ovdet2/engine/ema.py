"""A moving average of the weights, which is what is evaluated and published when SOLVER.EMA.ENABLED is set."""

from typing import Any

import torch
from detectron2.engine import HookBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ovdet2.engine.checkpoint import with_present_names
from ovdet2.errors import DataError, UsageError


class WeightAverage:
    """Exponential moving average of a trained model: torch's, with what a run must save and restore.

    Gradients are averaged over the processes, so each of them keeps the same average. Buffers are not averaged: they
    are the trained model's. A checkpoint's "model" is the average, so the file holds the weights that were
    evaluated; the trained weights are stored separately (:meth:`state_dict`).
    """

    def __init__(self, trained: torch.nn.Module, decay: float) -> None:
        """
        Args:
            trained: module, without a DistributedDataParallel wrapper.
            decay: share of the average that a step keeps, 0 to 1.

        Raises:
            UsageError: another decay.
        """
        if not 0 <= decay <= 1:
            raise UsageError(f"SOLVER.EMA.DECAY is {decay}: choose a share from 0 to 1, such as 0.9997.")
        self._trained = trained
        self._average = AveragedModel(trained, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.model = self._average.module.requires_grad_(False)

    def update(self) -> None:
        """Average the weights of a finished step into the average; the first update copies them."""
        self._average.update_parameters(self._trained)

    @torch.no_grad()
    def follow_buffers(self) -> None:
        """Take the trained model's buffers, after a change outside of a step."""
        for mine, theirs in zip(self.model.buffers(), self._trained.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def start_training_from_average(self) -> None:
        """Copy weights and buffers that were loaded into the average into the trained model."""
        for source, target in zip(
            (*self.model.parameters(), *self.model.buffers()),
            (*self._trained.parameters(), *self._trained.buffers()),
            strict=True,
        ):
            target.copy_(source)

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters and the number of updates; the average itself is saved as the model."""
        parameters = {name: parameter.detach() for name, parameter in self._trained.named_parameters()}
        return {"parameters": parameters, "updates": int(self._average.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, after the average was loaded."""
        self.start_training_from_average()
        restore_trained(self._trained, state)
        self._average.n_averaged.fill_(state["updates"])


@torch.no_grad()
def restore_trained(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load the trained parameters of :meth:`WeightAverage.state_dict` into a model that holds the average.

    Raises:
        DataError: they are another model's.
    """
    parameters, saved = dict(model.named_parameters()), with_present_names(state["parameters"], model)
    if parameters.keys() != saved.keys():
        different = sorted(parameters.keys() ^ saved.keys())[:3]
        raise DataError(
            f"the checkpoint was written by a run of another model (parameters {', '.join(different)}, ...): resume "
            "with the configuration of that run, or start without --resume."
        )
    for name, parameter in parameters.items():
        parameter.copy_(saved[name])


class AverageHook(HookBase):
    """Updates a :class:`WeightAverage` after each step."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def after_step(self) -> None:
        self.average.update()
