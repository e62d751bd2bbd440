from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from esper_servers.policy import schema

from .config import RiskConfig
from .reading import NOTHING, OPTIMIZER, OPTIMIZER_FOR_SEED, PAUSE, PAUSE_AND_HOLD, Reading
from .signals import (
    blueprint,
    degraded_inputs,
    device_pressure,
    gradient_norm,
    gradient_volatility,
    isolation,
    latency,
    lifecycle,
    loss,
    loss_variance,
    memory,
    optimizer_hints,
    stability,
)
from .step_signals import StepSignals

SIGNALS: Mapping[str, Callable[[StepSignals, RiskConfig], Reading | None]] = {
    "loss": loss.read,
    "blueprint": blueprint.read,
    "memory": memory.read,
    "device_pressure": device_pressure.read,
    "latency": latency.read,
    "isolation": isolation.read,
    "degraded_inputs": degraded_inputs.read,
    "gradient_norm": gradient_norm.read,
    "gradient_volatility": gradient_volatility.read,
    "loss_variance": loss_variance.read,
    "stability": stability.read,
    "optimizer_hints": optimizer_hints.read,
    "lifecycle": lifecycle.read,
}
"""Of two that demand the same, the first gives the reason."""
RISK_EMERGENCY = "risk_emergency"
CONSERVATIVE = "conservative_mode"
_ALL = (True, True, True, True)
_NO_SEED = (True, False, True, True)
_ONLY_PAUSE = (True, False, False, True)
_NOTHING = (True, False, False, False)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What remains of the kinds of action, by schema.KIND_*, and why fewer than all."""

    allowed: tuple[bool, bool, bool, bool]
    demand: int
    reason: str
    score: float
    readings: Mapping[str, Reading]
    """By signal; one that was not judged is absent."""
    holds: bool = False
    """Whether the run must enter conservative mode."""

    @property
    def forced(self) -> int | None:
        """The kind that this step must take, whatever the policy wants."""
        if not self.allowed[schema.KIND_PAUSE]:
            return None
        return {OPTIMIZER: schema.KIND_OPTIMIZER, PAUSE: schema.KIND_PAUSE, PAUSE_AND_HOLD: schema.KIND_PAUSE}.get(
            self.demand
        )

    @property
    def replaces_seed(self) -> bool:
        """Whether the optimizer is adjusted where the policy wants a seed operation."""
        return self.demand == OPTIMIZER_FOR_SEED and self.allowed[schema.KIND_OPTIMIZER]

    @property
    def is_high(self) -> bool:
        """Whether the risk is high."""
        return self.demand >= PAUSE

    @property
    def is_nominal(self) -> bool:
        """Whether no signal demands anything."""
        return self.demand == NOTHING


def judge(step: StepSignals, config: RiskConfig, *, conservative: bool) -> Verdict:
    """Judge one step, most severe demand first. Raises nothing, whatever the numbers."""
    readings = read_all(step, config)
    worst = max(readings.values(), key=_demand)
    score = combined_score(readings, config)
    if worst.demand < PAUSE and _is_emergency(readings, config):
        worst = Reading(PAUSE, score, RISK_EMERGENCY)
    if worst.demand >= PAUSE:
        repeated = step.high_steps + 1 >= config.repeats
        holds = repeated or worst.demand == PAUSE_AND_HOLD
        return Verdict(_ONLY_PAUSE, worst.demand, worst.reason, score, readings, holds)
    if conservative:
        return Verdict(_NOTHING, worst.demand, CONSERVATIVE, score, readings)
    return Verdict(_NO_SEED if worst.demand else _ALL, worst.demand, worst.reason, score, readings)


def read_all(step: StepSignals, config: RiskConfig) -> dict[str, Reading]:
    """Return the readings of all signals that can be judged."""
    found = ((name, read(step, config)) for name, read in SIGNALS.items())
    return {name: reading for name, reading in found if reading is not None}


def combined_score(readings: Mapping[str, Reading], config: RiskConfig) -> float:
    """Return the weighted score of the dimensions that are known, 0 when none is."""
    known = [(weight, readings[name].score) for name, weight in _weights(config) if name in readings]
    total = sum(weight for weight, _ in known)
    return sum(weight * score for weight, score in known) / total if total else 0.0


def _is_emergency(readings: Mapping[str, Reading], config: RiskConfig) -> bool:
    high = [name for name, _ in _weights(config) if name in readings and readings[name].score > config.emergency_score]
    return len(high) >= config.emergency_dimensions


def _weights(config: RiskConfig) -> tuple[tuple[str, float], ...]:
    return (
        ("gradient_norm", config.gradient_weight),
        ("memory", config.memory_weight),
        ("latency", config.latency_weight),
        ("loss_variance", config.loss_variance_weight),
    )


def _demand(reading: Reading) -> int:
    return reading.demand
