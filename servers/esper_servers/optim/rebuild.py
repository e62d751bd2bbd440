from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper_rpc.errors import FailedPrecondition, InvalidRequest

from . import groups, moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Joining:
    """Parameters that become a group of an optimizer."""

    parameters: Sequence[Tensor]
    rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerChange:
    """What becomes of the parameters of an optimizer. All others stay, with what is remembered of them."""

    joining: Sequence[Joining] = ()
    leaving: Sequence[Tensor] = ()
    replaced: Mapping[Tensor, Tensor] = field(default_factory=dict)
    """By the old parameter the new one in its place, which may have another shape."""


def rebuild(optimizer: Optimizer, change: OptimizerChange, *, like: int = 0) -> None:
    """Change which parameters an optimizer trains, in place. All or nothing.

    First everything is made aside, then it is put in at once: schedulers, scalers and the loop keep the optimizer that
    they hold. What is remembered of parameters that stay is the same tensors as before. A group that joins has the
    options of group `like`.

    Raises:
        InvalidRequest: When a parameter that leaves or is replaced is not in the optimizer, or a new one is already.
        FailedPrecondition: When the optimizer remembers nothing by parameter, as L-BFGS.
    """
    _check(optimizer, change)
    states = _states(optimizer, change)
    with _restored_on_failure(optimizer):
        for old, new in change.replaced.items():
            _put_in_place(optimizer, old, new)
        for parameter, state in states.items():
            optimizer.state[parameter] = state
        model = dict(optimizer.param_groups[like])
        groups.take_out(optimizer, change.leaving)
        for joining in change.joining:
            groups.join(optimizer, joining.parameters, like=model, rate=joining.rate)
        _verify(optimizer)


def _check(optimizer: Optimizer, change: OptimizerChange) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise FailedPrecondition("L-BFGS remembers all parameters as one; it cannot take in or let go of any.")
    if not all(joining.parameters for joining in change.joining):
        raise InvalidRequest("A group that joins has one parameter at least.")
    present = groups.held(optimizer)
    gone = [*change.leaving, *change.replaced]
    new = [*change.replaced.values(), *(each for joining in change.joining for each in joining.parameters)]
    if not present.issuperset(gone) or len(set(gone)) < len(gone):
        raise InvalidRequest("A parameter that leaves or is replaced is not in the optimizer, or named twice.")
    if not present.isdisjoint(new) or len(set(new)) < len(new):
        raise InvalidRequest("A parameter that joins is in the optimizer already, or named twice.")


def _states(optimizer: Optimizer, change: OptimizerChange) -> dict[Tensor, dict[str, Any]]:
    """Make what is remembered of new parameters from what is remembered of those whose place they take."""
    found = {}
    for old, new in change.replaced.items():
        state = moments.carried_over(optimizer.state.get(old, {}), old, new)
        if state:
            found[new] = state
    return found


@contextmanager
def _restored_on_failure(optimizer: Optimizer) -> Iterator[None]:
    groups_before = list(optimizer.param_groups)
    contents = [{**group, "params": list(group["params"])} for group in groups_before]
    states = dict(optimizer.state)
    try:
        yield
    except BaseException:
        for group, content in zip(groups_before, contents, strict=True):
            group.clear()
            group.update(content)
        optimizer.param_groups[:] = groups_before
        optimizer.state.clear()
        optimizer.state.update(states)
        raise


def _put_in_place(optimizer: Optimizer, old: Tensor, new: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]
    optimizer.state.pop(old, None)


def _verify(optimizer: Optimizer) -> None:
    present = groups.held(optimizer)
    if not optimizer.param_groups:
        raise FailedPrecondition("The optimizer would have no parameters left.")
    # Some optimizers keep things by name beside those by parameter.
    if not present.issuperset(key for key in optimizer.state if isinstance(key, Tensor)):
        raise FailedPrecondition("The optimizer would remember parameters that it does not train.")
