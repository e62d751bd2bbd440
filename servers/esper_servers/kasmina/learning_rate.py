from __future__ import annotations

from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from esper_rpc.errors import FailedPrecondition
from esper_servers.optim import groups
from esper_servers.optim.controller import JOINING_SHARE, LEAST_TOTAL, MOST_TOTAL


class LearningRateAuthority(Protocol):
    """The only one who changes the user's optimizer on behalf of the mesh."""

    def scale(self, multiplier: float) -> bool:
        """Multiply every learning rate; False, with nothing changed, when that is too far from the user's."""
        ...

    def adopt(self, module: nn.Module) -> None:
        """Train the parameters of a fossilised seed from here on, at 10 % of the base rate."""
        ...

    def release(self, module: nn.Module) -> None:
        """Train the parameters of an adopted seed no longer; a module that was not adopted is left alone."""
        ...

    def step(self) -> None:
        """End a training step: update what the user's optimizer does not update by itself."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the user's optimizer."""
        ...

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise FailedPrecondition when it is of another authority."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, after the fossilised seeds were adopted again."""
        ...


class RankAuthority(LearningRateAuthority, Protocol):
    """One of those of several ranks, whose rates must be the same in each step."""

    @property
    def rates(self) -> tuple[float, ...]:
        """What the ranks compare; empty where the user sets the rates."""
        ...

    def follow(self, multiplier: float) -> None:
        """Multiply every learning rate, as the first rank has decided."""
        ...

    def take_observed(self) -> tuple[int, float]:
        """Return how many losses were observed here since the last step, and their sum."""
        ...

    def settle(self, loss: float) -> None:
        """Go on from the mean of what all ranks observed."""
        ...


class OptimizerAuthority:
    """The learning rates of a user's optimizer, where the user or the user's scheduler sets them.

    A UnifiedLRController stands in its place where the mesh is to be the only one who does.

    Adopted parameters become a new group of it. If a scheduler drives it they do not: most schedulers refuse a group
    that they have not seen at their start, and would raise in the user's loop. They then get an optimizer of the same
    class, whose learning rate follows the user's.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._followers: list[Optimizer] = []
        self.total = 1.0
        """The product of all multipliers."""
        self.rates: tuple[float, ...] = ()

    def take_observed(self) -> tuple[int, float]:
        """Return that no loss is observed here."""
        return 0, 0.0

    def settle(self, loss: float) -> None:
        """Do nothing: the user sets the rates."""

    def scale(self, multiplier: float) -> bool:
        """Multiply the learning rate of every group, within the limits."""
        if not LEAST_TOTAL <= self.total * multiplier <= MOST_TOTAL:
            return False
        self.follow(multiplier)
        return True

    def follow(self, multiplier: float) -> None:
        """Multiply every learning rate, as the first of several ranks has decided."""
        self.total *= multiplier
        for group in self._optimizer.param_groups:
            group["lr"] *= multiplier

    def adopt(self, module: nn.Module) -> None:
        """Train these parameters from here on."""
        parameters = groups.trainable(module)
        if not parameters:
            return
        base = self._optimizer.param_groups[0]
        rate = float(base["lr"] * JOINING_SHARE)
        if self._is_scheduled():
            self._followers.append(groups.alone(self._optimizer, parameters, like=base, rate=rate))
        else:
            groups.join(self._optimizer, parameters, like=base, rate=rate)

    def release(self, module: nn.Module) -> None:
        """Take these parameters out with what the optimizer remembered of them; all others keep their state."""
        released = set(module.parameters())
        for optimizer in (self._optimizer, *self._followers):
            groups.take_out(optimizer, released)
        self._followers = [follower for follower in self._followers if follower.param_groups]

    def step(self) -> None:
        """Step the followers at their share of the user's present learning rate."""
        for follower in self._followers:
            for group in follower.param_groups:
                group["lr"] = self._optimizer.param_groups[0]["lr"] * JOINING_SHARE
            follower.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the multiplier and the followers; the groups are in the user's own checkpoint."""
        return {"total": self.total, "followers": [follower.state_dict() for follower in self._followers]}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise FailedPrecondition when it is that of a UnifiedLRController."""
        if "followers" not in state:
            raise FailedPrecondition(
                "The checkpoint is of a training whose learning rates a UnifiedLRController set: attach with one"
                " that is made alike (learning_rate=)."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them. The user restores the user's optimizer, after this."""
        self.check_state(state)
        self.total = state["total"]
        for follower, saved in zip(self._followers, state["followers"], strict=False):
            follower.load_state_dict(saved)

    def _is_scheduled(self) -> bool:
        # Every torch scheduler sets it on the groups that it finds.
        return "initial_lr" in self._optimizer.param_groups[0]
