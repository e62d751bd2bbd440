"""How a learning rate goes with the steps. Each schedule is a value, and its rate a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Final, Protocol

from esper_rpc.config import Range, validate

LEAST_RATE: Final = 1e-6
"""No schedule goes below it, unless the base does (requirements 3.5)."""
_MOST_STEPS: Final = 10**12


class Schedule(Protocol):
    """Gives the learning rate of a group."""

    def rate(self, base: float, step: int) -> float:
        """Return the rate that follows so many steps, for a group whose rate is `base` at full strength."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """Stays at the base."""

    def rate(self, base: float, step: int) -> float:
        """Return the base."""
        return base


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """Does not learn: the rate is 0, and neither a multiplier nor the least rate changes that."""

    def rate(self, base: float, step: int) -> float:
        """Return 0."""
        return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cosine:
    """Falls from the base to the least rate on half a cosine, and stays there."""

    total_steps: Annotated[int, Range(1, _MOST_STEPS)]
    least: Annotated[float, Range(0.0, 1e6)] = LEAST_RATE

    def __post_init__(self) -> None:
        validate(self)

    def rate(self, base: float, step: int) -> float:
        """Return the rate; CosineAnnealingLR gives the same up to its T_max."""
        if step >= self.total_steps:
            return min(base, self.least)
        share = (1 + math.cos(math.pi * step / self.total_steps)) / 2
        least = min(base, self.least)
        return least + (base - least) * share


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDecay:
    """Falls by a factor every so many steps."""

    every: Annotated[int, Range(1, _MOST_STEPS)]
    factor: Annotated[float, Range(0.0, 1.0)] = 0.1

    def __post_init__(self) -> None:
        validate(self)

    def rate(self, base: float, step: int) -> float:
        """Return the rate; StepLR gives the same."""
        return float(base * self.factor ** (step // self.every))


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUp:
    """Rises linearly from a share of what follows to all of it; what follows begins when that is over."""

    steps: Annotated[int, Range(0, _MOST_STEPS)]
    factor: Annotated[float, Range(0.0, 1.0)] = 0.1
    then: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        validate(self)

    def rate(self, base: float, step: int) -> float:
        """Return the rate; LinearLR and what follows it in a SequentialLR give the same."""
        return ramp(step, self.steps, self.factor) * self.then.rate(base, max(0, step - self.steps))


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptive:
    """Falls by a factor when the loss does not fall any more, on top of another schedule.

    `observe` of the controller brings the losses: one for each evaluation, not for each batch.
    """

    factor: Annotated[float, Range(0.0, 1.0)] = 0.1
    patience: Annotated[int, Range(0, _MOST_STEPS)] = 10
    """Losses in a row that are no better, before the rate falls."""
    threshold: Annotated[float, Range(0.0, 1.0)] = 1e-4
    """How much better a loss has to be, as a share of the best."""
    cool_down: Annotated[int, Range(0, _MOST_STEPS)] = 0
    """Losses after a fall that do not count."""
    then: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        validate(self)

    def rate(self, base: float, step: int) -> float:
        """Return the rate before any fall."""
        return self.then.rate(base, step)


def ramp(step: int, steps: int, factor: float) -> float:
    """Rise from `factor` to 1 within so many steps."""
    return 1.0 if step >= steps else factor + (1.0 - factor) * max(0, step) / steps


def adaptive_of(schedule: Schedule | None) -> Adaptive | None:
    """Return the adaptive part of a schedule, None when it has none."""
    while schedule is not None and not isinstance(schedule, Adaptive):
        schedule = getattr(schedule, "then", None)
    return schedule
