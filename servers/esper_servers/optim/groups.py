"""Parameters that join an optimizer or leave it. What it remembers of all others is not touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_OF_ITS_OWN = ("params", "param_names", "lr", "initial_lr")


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def options_of(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a group says of how its parameters learn, but for the rate."""
    return {key: value for key, value in group.items() if key not in _OF_ITS_OWN}


def held(optimizer: Optimizer) -> set[Tensor]:
    """Return every parameter of an optimizer."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def join(optimizer: Optimizer, parameters: Sequence[Tensor], *, like: dict[str, Any], rate: float) -> None:
    """Add a group with the options of another; raises what torch says of parameters that it does not take."""
    own_rate = torch.full_like(like["lr"], rate) if isinstance(like["lr"], Tensor) else rate
    place = len(optimizer.param_groups)
    names = [f"joined.{place}.{index}" for index in range(len(parameters))]
    members = list(zip(names, parameters, strict=True)) if "param_names" in like else list(parameters)
    optimizer.add_param_group({**options_of(like), "params": members, "lr": own_rate})


def alone(optimizer: Optimizer, parameters: Sequence[Tensor], *, like: dict[str, Any], rate: float) -> Optimizer:
    """Return an optimizer of the same class for these parameters, with the options of a group."""
    kind: Any = type(optimizer)
    own_rate = torch.full_like(like["lr"], rate) if isinstance(like["lr"], Tensor) else rate
    made: Optimizer = kind([{**options_of(like), "params": list(parameters), "lr": own_rate}], lr=own_rate)
    return made


def take_out(optimizer: Optimizer, released: Iterable[Tensor]) -> None:
    """Remove parameters with what is remembered of them; a group that has none left goes too."""
    released = set(released)
    # By parameter: load_state_dict puts other dictionaries in the place of the groups.
    for group in [group for group in optimizer.param_groups if not released.isdisjoint(group["params"])]:
        _keep(group, [each not in released for each in group["params"]])
        if not group["params"]:
            optimizer.param_groups[:] = [each for each in optimizer.param_groups if each is not group]
    for parameter in released:
        optimizer.state.pop(parameter, None)


def _keep(group: dict[str, Any], stays: Sequence[bool]) -> None:
    for key in ("params", "param_names"):
        if key in group:
            group[key] = [each for each, kept in zip(group[key], stays, strict=True) if kept]
