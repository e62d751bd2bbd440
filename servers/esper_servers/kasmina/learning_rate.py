from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

from torch import nn
from torch.optim import Optimizer

from .limits import LocalLimits

FOSSIL_SHARE: Final = 0.1
"""The learning rate of a fossilised seed as a share of the user's."""


class LearningRateAuthority(Protocol):
    """Owns the learning rates of a run."""

    def scale(self, multiplier: float) -> bool:
        """Multiply the learning rate; False, with nothing changed, when a local limit forbids it."""
        ...

    def adopt(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train these from here on, at 10 % of the base learning rate."""
        ...

    def step(self) -> None:
        """End a training step: update what the user's optimizer does not update by itself."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the user's optimizer."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, after the adopted parameters were adopted again."""
        ...


class OptimizerAuthority:
    """The learning rates of a user's optimizer.

    Adopted parameters become a new group of it. If a scheduler drives it they do not: most schedulers refuse a group
    that they have not seen at their start, and would raise in the user's loop. They then get an optimizer of the same
    class, whose learning rate follows the user's.
    """

    def __init__(self, optimizer: Optimizer, *, limits: LocalLimits | None = None) -> None:
        self._optimizer = optimizer
        self._limits = limits or LocalLimits()
        self._followers: list[Optimizer] = []
        self.total = 1.0
        """The product of all multipliers."""

    def scale(self, multiplier: float) -> bool:
        """Multiply the learning rate of every group, within the limits."""
        limits, total = self._limits, self.total * multiplier
        if not limits.least_multiplier <= multiplier <= limits.most_multiplier:
            return False
        if not limits.least_total_multiplier <= total <= limits.most_total_multiplier:
            return False
        self.total = total
        for group in self._optimizer.param_groups:
            group["lr"] *= multiplier
        return True

    def adopt(self, parameters: Sequence[nn.Parameter]) -> None:
        """Train these from here on."""
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not parameters:
            return
        base = self._optimizer.param_groups[0]
        options = {key: value for key, value in base.items() if key not in ("params", "initial_lr")}
        options["lr"] = base["lr"] * FOSSIL_SHARE
        if self._is_scheduled():
            self._followers.append(_another(self._optimizer, parameters, options))
        else:
            self._optimizer.add_param_group({"params": parameters, **options})

    def step(self) -> None:
        """Step the followers at their share of the user's present learning rate."""
        for follower in self._followers:
            for group in follower.param_groups:
                group["lr"] = self._optimizer.param_groups[0]["lr"] * FOSSIL_SHARE
            follower.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier and the followers; the groups are in the user's own checkpoint."""
        return {"total": self.total, "followers": [follower.state_dict() for follower in self._followers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them. The user's optimizer is restored by the user, after this."""
        self.total = state["total"]
        for follower, saved in zip(self._followers, state["followers"], strict=False):
            follower.load_state_dict(saved)

    def _is_scheduled(self) -> bool:
        # Every torch scheduler sets it on the groups that it finds.
        return "initial_lr" in self._optimizer.param_groups[0]


def _another(optimizer: Optimizer, parameters: list[nn.Parameter], options: dict[str, Any]) -> Optimizer:
    kind: Any = type(optimizer)
    return kind([{"params": parameters, **options}], lr=options["lr"])  # type: ignore[no-any-return]
