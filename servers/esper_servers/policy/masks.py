from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation
from esper_rpc.proto.leyline.v1 import SeedState

from . import prior, schema
from .parameters import Parameters

# A name of an enum is looked up by string each time, and this is asked many times a step.
GERMINATE = Operation.SEED_OPERATION_GERMINATE

# What the controller may ask of a seed in each stage; the host holds the same table and checks again.
LEGAL_OPERATIONS: Mapping[int, tuple[Operation.ValueType, ...]] = {
    Stage.SEED_LIFECYCLE_STAGE_DORMANT: (Operation.SEED_OPERATION_GERMINATE,),
    Stage.SEED_LIFECYCLE_STAGE_GERMINATED: (Operation.SEED_OPERATION_START_TRAINING, Operation.SEED_OPERATION_CULL),
    Stage.SEED_LIFECYCLE_STAGE_TRAINING: (Operation.SEED_OPERATION_START_GRAFTING, Operation.SEED_OPERATION_CULL),
    Stage.SEED_LIFECYCLE_STAGE_BLENDING: (Operation.SEED_OPERATION_STABILIZE, Operation.SEED_OPERATION_CULL),
    Stage.SEED_LIFECYCLE_STAGE_SHADOWING: (Operation.SEED_OPERATION_EVALUATE, Operation.SEED_OPERATION_CULL),
    Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY: (Operation.SEED_OPERATION_FOSSILIZE, Operation.SEED_OPERATION_CULL),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """One action. What follows `kind` matters only where the kind needs it."""

    kind: int
    seed: int = -1
    operation: int = 0
    blueprint: int = -1
    schedule: int = 0
    parameters: Parameters = prior.PARAMETERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Masks:
    """What is legal: booleans shaped like the logits. S seeds, B blueprints."""

    kind: NDArray[np.bool_]
    operation: NDArray[np.bool_]
    blueprint: NDArray[np.bool_]
    """(S, B): which blueprint may grow in which seed."""
    schedule: NDArray[np.bool_]
    """(S, 4): how each seed may be blended; at least one way."""


def legal(
    seeds: Sequence[SeedState],
    plantable: NDArray[np.bool_],
    blendable: NDArray[np.bool_],
    features: frozenset[str],
) -> Masks:
    """Mask what the stage forbids, what the run does not offer, and seeds where no blueprint is `plantable` (S, B).

    `blendable` (S, 4) tells how each seed may be blended.
    """
    operation = np.zeros((len(seeds), schema.OPERATION_COUNT), dtype=bool)
    for i, seed in enumerate(seeds):
        for number in LEGAL_OPERATIONS.get(seed.stage, ()):
            operation[i, number] = number != GERMINATE or plantable[i].any()
    offered = [True, "seed" in features and bool(operation.any()), "optimizer" in features, "pause" in features]
    return Masks(kind=np.array(offered), operation=operation, blueprint=plantable, schedule=blendable)


def choose(
    kind: NDArray[np.float32],
    operation: NDArray[np.float32],
    blueprint: NDArray[np.float32],
    schedule: NDArray[np.float32],
    masks: Masks,
) -> Choice:
    """Take the most likely legal action; ties go to the lower index."""
    best = int(np.where(masks.kind, kind, -np.inf).argmax())
    if best != schema.KIND_SEED:
        return Choice(best)
    flat = int(np.where(masks.operation, operation, -np.inf).argmax())
    seed, number = divmod(flat, schema.OPERATION_COUNT)
    chosen = -1
    if number == GERMINATE:
        chosen = int(np.where(masks.blueprint[seed], blueprint, -np.inf).argmax())
    return Choice(best, seed, number, chosen, int(np.where(masks.schedule[seed], schedule, -np.inf).argmax()))
