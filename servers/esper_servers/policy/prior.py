"""The stated heuristic that steers until a policy is trained: a deterministic bonus on the network's logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from esper_rpc.config import Range, validate
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation
from esper_rpc.proto.leyline.v1 import SeedState

from . import schema
from .parameters import Parameters

ORIGIN = "Untrained network with the heuristic prior `heuristic-1` (plateau → germinate, time and loss → onward)."
STRONG = 10.0
PARAMETERS = Parameters(learning_rate_multiplier=0.8, blending_schedule_start=0.0, blending_schedule_end=1.0)
_PARAMETERS = np.array(PARAMETERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorConfig:
    """Thresholds, in steps and in units of loss."""

    warm_up_steps: Annotated[int, Range(0, 10**9)] = 30
    steps_between_germinations: Annotated[int, Range(0, 10**9)] = 60
    training_steps: Annotated[int, Range(1, 10**9)] = 60
    shadow_steps: Annotated[int, Range(1, 10**9)] = 10
    probation_steps: Annotated[int, Range(1, 10**9)] = 30
    tolerated_regression: Annotated[float, Range(0, 100)] = 0.05
    oscillation: Annotated[float, Range(0, 100)] = 0.5
    weight: Annotated[float, Range(0, 1)] = 1.0
    """Of the bonus on the logits, and of `PARAMETERS` among the parameters; a trained policy says its own, 0 where it
    needs none."""

    def __post_init__(self) -> None:
        validate(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSignals:
    """What the controller remembers of a run between steps."""

    steps: int
    steps_since_germination: int
    loss_trend: float
    """Slow mean of the loss minus its fast mean: positive while the loss falls."""
    loss_volatility: float
    """Standard deviation of the loss over its mean."""
    steps_since_optimizer: int


@dataclass(frozen=True, slots=True)
class Bonus:
    """What the prior adds."""

    kind: NDArray[np.float32]
    operation: NDArray[np.float32]
    weight: float

    def mixed_with(self, parameters: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the parameters of the network and of the prior by its weight: at 1 exactly those of the prior."""
        return (_PARAMETERS * self.weight + parameters * (1.0 - self.weight)).astype(np.float32)


def bonus(seeds: Sequence[SeedState], signals: RunSignals, config: PriorConfig) -> Bonus:
    """Compute the bonus of one step."""
    operation = np.zeros((len(seeds), schema.OPERATION_COUNT), dtype=np.float32)
    kind = np.zeros(schema.KIND_COUNT, dtype=np.float32)
    kind[schema.KIND_NONE] = STRONG / 2
    for i, seed in enumerate(seeds):
        wanted = next_operation(seed, signals, config)
        if wanted is not None:
            operation[i, wanted] = STRONG
            kind[schema.KIND_SEED] = STRONG
    if signals.loss_volatility > config.oscillation and signals.steps_since_optimizer > 100:
        kind[schema.KIND_OPTIMIZER] = 1.5 * STRONG
    return Bonus(kind * np.float32(config.weight), operation * np.float32(config.weight), config.weight)


def next_operation(seed: SeedState, signals: RunSignals, config: PriorConfig) -> Operation.ValueType | None:
    """Return the operation that a seed is due for, None while it should be left alone."""
    waited = seed.metrics.get("steps_in_stage", 0.0)
    alpha = seed.metrics.get("alpha", 0.0)
    match seed.stage:
        case Stage.SEED_LIFECYCLE_STAGE_DORMANT:
            ready = signals.steps >= config.warm_up_steps
            ready &= signals.steps_since_germination >= config.steps_between_germinations
            return Operation.SEED_OPERATION_GERMINATE if ready else None
        case Stage.SEED_LIFECYCLE_STAGE_GERMINATED:
            return Operation.SEED_OPERATION_START_TRAINING
        case Stage.SEED_LIFECYCLE_STAGE_TRAINING:
            return Operation.SEED_OPERATION_START_GRAFTING if waited >= config.training_steps else None
        case Stage.SEED_LIFECYCLE_STAGE_BLENDING:
            return Operation.SEED_OPERATION_STABILIZE if alpha >= 0.99 else None
        case Stage.SEED_LIFECYCLE_STAGE_SHADOWING:
            return Operation.SEED_OPERATION_EVALUATE if waited >= config.shadow_steps else None
        case Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY:
            return _verdict(seed, config) if waited >= config.probation_steps else None
    return None


def _verdict(seed: SeedState, config: PriorConfig) -> Operation.ValueType:
    change = seed.metrics.get("loss_since_graft", 0.0)
    kept = not math.isnan(change) and change <= config.tolerated_regression
    return Operation.SEED_OPERATION_FOSSILIZE if kept else Operation.SEED_OPERATION_CULL
