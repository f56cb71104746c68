"""What SOLVER.* configures: the optimizer and its parameter groups, gradient clipping, mixed precision."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping, reduce_param_groups

from ovdet2.errors import UsageError

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def build_optimizer(cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
    """SGD or AdamW (SOLVER.OPTIMIZER) with Detectron2's parameter groups and its clipping per parameter, the learning
    rates multiplied by SOLVER.LR_FACTORS.

    Raises:
        UsageError: another optimizer, another way of clipping, or see :func:`scale_learning_rates`.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in ("SGD", "AdamW"):
        raise UsageError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}: use 'SGD' or 'AdamW'.")
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    groups = scale_learning_rates(groups, model, solver.LR_FACTORS)
    optimizer: Any = torch.optim.SGD if solver.OPTIMIZER == "SGD" else torch.optim.AdamW
    if full_model_norm(cfg) is None:  # else done by CheckedStep, which computes the norm anyway
        optimizer = maybe_add_gradient_clipping(cfg, optimizer)
    shared = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        return optimizer(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **shared)
    return optimizer(groups, fused=True, **shared)


def scale_learning_rates(
    groups: list[dict[str, Any]], model: torch.nn.Module, factors: Sequence[tuple[str, float]]
) -> list[dict[str, Any]]:
    """Multiply learning rates by parameter name.

    Args:
        groups: list of dicts with "params" and "lr", of parameters of ``model``.
        model: module.
        factors: list of [pattern, factor]; a pattern is a regular expression that may match anywhere in a
            parameter's name; the first matching pattern applies.

    Returns:
        list of groups, merged by their settings.

    Raises:
        UsageError: an entry of another form, or a pattern that is in no name: a misspelt one would change nothing.
    """
    if not factors:
        return groups
    factor_of, used = {}, set()
    try:
        patterns = [(re.compile(pattern), float(factor)) for pattern, factor in factors]
    except (re.error, TypeError, ValueError) as error:
        raise UsageError(
            f'SOLVER.LR_FACTORS is {factors} ({error}): give a list of [pattern, factor], as [["backbone", 0.1]].'
        ) from None
    for name, parameter in model.named_parameters():
        found = [(pattern.pattern, factor) for pattern, factor in patterns if pattern.search(name)]
        used.update(pattern for pattern, _ in found)
        factor_of[parameter] = found[0][1] if found else 1.0
    unused = [pattern.pattern for pattern, _ in patterns if pattern.pattern not in used]
    if unused:
        modules = ", ".join(dict.fromkeys(name.split(".")[0] for name, _ in model.named_parameters()))
        raise UsageError(
            f"SOLVER.LR_FACTORS names {', '.join(unused)}, which is in no parameter's name: print the model for the "
            f"names (its modules are {modules}), or remove the entry."
        )
    return reduce_param_groups(
        [
            {**group, "params": [parameter], "lr": group["lr"] * factor_of[parameter]}
            for group in groups
            for parameter in group["params"]
        ]
    )


def full_model_norm(cfg: CfgNode) -> float | None:
    """The largest L2 norm over all gradients, for CLIP_TYPE "full_model" of DETR-like recipes; None for Detectron2's
    "value" and "norm", which clip each parameter, and without clipping.

    Raises:
        UsageError: another CLIP_TYPE.
    """
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    if clipping.ENABLED and clipping.CLIP_TYPE not in ("value", "norm", "full_model"):
        raise UsageError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clipping.CLIP_TYPE!r}: use 'value', 'norm' (both per parameter) or "
            "'full_model' (the L2 norm over all parameters)."
        )
    return clipping.CLIP_VALUE if clipping.ENABLED and clipping.CLIP_TYPE == "full_model" else None


def mixed_precision(cfg: CfgNode) -> tuple[torch.dtype | None, torch.amp.GradScaler | None]:
    """The type of the forward pass and the scaler of its gradients: (torch.dtype or None, GradScaler or None).

    bfloat16 has the range of float32 and needs no scaler.

    Raises:
        UsageError: SOLVER.AMP.DTYPE is neither "bfloat16" nor "float16", or float16 on a CPU.
    """
    amp = cfg.SOLVER.AMP
    if not amp.ENABLED:
        return None, None
    if amp.DTYPE not in _AMP_DTYPES:
        raise UsageError(f"SOLVER.AMP.DTYPE is {amp.DTYPE!r}: use 'bfloat16' or 'float16'.")
    if amp.DTYPE == "bfloat16":
        return torch.bfloat16, None
    if not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UsageError(
            f"SOLVER.AMP.DTYPE is float16, but MODEL.DEVICE is {cfg.MODEL.DEVICE}: use bfloat16, or set "
            "SOLVER.AMP.ENABLED to False."
        )
    return torch.float16, torch.amp.GradScaler("cuda")
