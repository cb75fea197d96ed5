"""Optimisers and the schedule of the learning rate."""

from __future__ import annotations

import math
from bisect import bisect_right

from torch import Tensor, nn, optim

from sprompt.engine.config import TrainConfig

MOMENTUM = 0.9
LAST_FACTOR = 0.2  # on the learning rate at the end of the schedule epoch_cosine


def make_optimiser(task: nn.Module, config: TrainConfig) -> optim.Optimizer:
    """The optimiser of the trained parameters, with a group for each pair of a learning rate and a weight decay.

    The task may have `parameter_groups()`, which returns `ParameterGroup`s with factors on both; see `sprompt.models.protocol`.
    `backbone_lr_factor`, if it is given, replaces the task's factors on the learning rate of the backbone. The optimiser is fused: it
    skips an update, on the device, if its tensor `found_inf` holds 1.
    """
    own: dict[nn.Parameter, tuple[float, float]] = {}
    for parameters, rate, decay in getattr(task, "parameter_groups", tuple)():
        own.update(dict.fromkeys(parameters, (rate, decay)))
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            rate, decay = own.get(parameter, (1.0, 1.0))
            if config.backbone_lr_factor is not None and in_backbone(name):
                rate = config.backbone_lr_factor
            groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise ValueError("train: the task must have a parameter to train, got none that requires a gradient")
    listed = [
        {"params": parameters, "factor": rate, "weight_decay": decay * config.weight_decay}
        for (rate, decay), parameters in groups.items()
    ]
    lr = config.learning_rate
    if config.optimiser == "sgd":
        return optim.SGD(listed, lr=lr, momentum=MOMENTUM, fused=True)
    return optim.AdamW(listed, lr=lr, betas=config.betas, fused=True)


def in_backbone(name: str) -> bool:
    """Whether a parameter of this name belongs to a module named backbone."""
    return "backbone" in name.split(".")[:-1]


def factor_at(config: TrainConfig, step: int, epoch_steps: int) -> float:
    """The factor on the learning rate in a step. Steps count from 0; an epoch has `epoch_steps` steps."""
    if config.schedule == "epoch_cosine":
        epoch = step / epoch_steps
        if epoch < 1:
            return epoch
        share = min(1.0, (epoch - 1) / max(1, config.epochs - 1))
        return LAST_FACTOR + (1 - LAST_FACTOR) * (0.5 + 0.5 * math.cos(math.pi * share))
    if config.schedule == "cosine":
        factor = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / (config.epochs * epoch_steps)))
    else:
        factor = config.drop_factor ** bisect_right(sorted(config.drops), step // epoch_steps)
    if step < config.warmup_steps:
        factor *= config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps
    return factor


def set_rate(optimiser: optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group: `rate` times the factor of the group."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["factor"]


def optimiser_tensors(optimiser: optim.Optimizer, task: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state, as {"<parameter>/<key>": tensor}."""
    return {
        f"{name}/{key}": value
        for name, parameter in task.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser(optimiser: optim.Optimizer, task: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimiser_tensors`. A trained parameter without tensors has no state, as before its first step."""
    parameters = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    optimiser.state.clear()
    for place, value in tensors.items():
        name, _, key = place.rpartition("/")
        if name not in parameters:
            raise ValueError(
                f"the optimiser's state: must be of trained parameters, got {name!r}; the task has changed"
            )
        parameter = parameters[name]
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(
                f"the optimiser's state: {place} must have shape {tuple(parameter.shape)}, got {tuple(value.shape)}"
            )
        optimiser.state[parameter][key] = value.to(parameter.device)
