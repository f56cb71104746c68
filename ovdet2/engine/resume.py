"""Resume a run with other settings: what applies from then on, and what cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from torch import nn
from torch.optim import Optimizer

from ovdet2.errors import UsageError

_GROUPED_BY = "SOLVER.LR_FACTORS, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR, or what is frozen"


def run_settings(cfg: CfgNode) -> dict[str, str]:
    """{key: value} of SOLVER, as text: what a checkpoint states of its run."""
    return {f"SOLVER.{key}": value for key, value in _flat(cfg.SOLVER)}


def changes(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """ "SOLVER.BASE_LR 0.005 (before: 0.01)" for each key of both that differs."""
    return [f"{key} {now[key]} (before: {value})" for key, value in saved.items() if now.get(key, value) != value]


def parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The names of the optimizer's parameters in the order of its groups, by which its state is numbered."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def require_same_kind(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Require the kind of optimizer that wrote a state: the others' states mean something else.

    Raises:
        UsageError: another kind, which the state's settings reveal.
    """
    kind = "AdamW" if "betas" in optimizer.param_groups[0] else "SGD"
    saved = "AdamW" if any("betas" in group for group in state["param_groups"]) else "SGD"
    if kind != saved:
        raise UsageError(
            f"SOLVER.OPTIMIZER is {kind}, but the saved run was trained with {saved}, whose state cannot be used: set "
            f"SOLVER.OPTIMIZER {saved}, or start anew from the weights, with MODEL.WEIGHTS and another OUTPUT_DIR."
        )


def carried_over(
    optimizer: Optimizer, names: Sequence[str], state: Mapping[str, Any], saved_names: Sequence[str] | None
) -> tuple[dict[str, Any], list[str]]:
    """A saved state for an optimizer whose groups and settings may differ.

    Args:
        optimizer: of this run; its learning rates, decay and other settings stay.
        names: of its parameters, as of :func:`parameter_names`.
        state: ``state_dict()`` of the saved run's.
        saved_names: of the parameters of the saved run's; None for a checkpoint of an earlier version.

    Returns:
        (the state to load, the names of parameters that the saved run did not train: they start without a state).

    Raises:
        UsageError: another kind of optimizer; or the names are unknown and the groups differ.
    """
    require_same_kind(optimizer, state)
    merged = optimizer.state_dict()
    if saved_names is None:
        sizes, saved_sizes = ([len(group["params"]) for group in of["param_groups"]] for of in (merged, state))
        if sizes != saved_sizes:
            raise UsageError(
                f"the optimizer has groups of {sizes} parameters, in the saved run {saved_sizes}; that checkpoint, of an "
                f"earlier version, does not state their names: resume with the saved run's {_GROUPED_BY}."
            )
        saved_names = list(names)
    places = {name: place for place, name in enumerate(saved_names)}
    merged["state"] = {
        place: state["state"][places[name]]
        for place, name in enumerate(names)
        if name in places and places[name] in state["state"]
    }
    return merged, [name for name in names if name not in places]


def _flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in node.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return rows
