"""The eleven stages of a seed and the moves between them (requirements 4.3)."""

from __future__ import annotations

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SeedOperation as Operation

DORMANT = Stage.SEED_LIFECYCLE_STAGE_DORMANT
GERMINATED = Stage.SEED_LIFECYCLE_STAGE_GERMINATED
TRAINING = Stage.SEED_LIFECYCLE_STAGE_TRAINING
BLENDING = Stage.SEED_LIFECYCLE_STAGE_BLENDING
SHADOWING = Stage.SEED_LIFECYCLE_STAGE_SHADOWING
PROBATIONARY = Stage.SEED_LIFECYCLE_STAGE_PROBATIONARY
FOSSILIZED = Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED
CULLED = Stage.SEED_LIFECYCLE_STAGE_CULLED
EMBARGOED = Stage.SEED_LIFECYCLE_STAGE_EMBARGOED
RESETTING = Stage.SEED_LIFECYCLE_STAGE_RESETTING
TERMINATED = Stage.SEED_LIFECYCLE_STAGE_TERMINATED

# Stages in which the seed stands in the forward pass or learns.
LIVE = frozenset({GERMINATED, TRAINING, BLENDING, SHADOWING, PROBATIONARY})
BLENDED = frozenset({BLENDING, SHADOWING, PROBATIONARY})

TRANSITIONS: dict[Stage.ValueType, frozenset[Stage.ValueType]] = {
    DORMANT: frozenset({GERMINATED, TERMINATED}),
    GERMINATED: frozenset({TRAINING, CULLED, TERMINATED}),
    TRAINING: frozenset({BLENDING, CULLED, TERMINATED}),
    BLENDING: frozenset({SHADOWING, CULLED, TERMINATED}),
    SHADOWING: frozenset({PROBATIONARY, CULLED, TERMINATED}),
    PROBATIONARY: frozenset({FOSSILIZED, CULLED, TERMINATED}),
    FOSSILIZED: frozenset({TERMINATED}),
    CULLED: frozenset({EMBARGOED, TERMINATED}),
    EMBARGOED: frozenset({RESETTING, TERMINATED}),
    RESETTING: frozenset({DORMANT, TERMINATED}),
    TERMINATED: frozenset(),
}

# A forward move needs a command. Embargo, reset and the return to dormancy are the host's own.
OPERATIONS: dict[Operation.ValueType, dict[Stage.ValueType, Stage.ValueType]] = {
    Operation.SEED_OPERATION_GERMINATE: {DORMANT: GERMINATED},
    Operation.SEED_OPERATION_START_TRAINING: {GERMINATED: TRAINING},
    Operation.SEED_OPERATION_START_GRAFTING: {TRAINING: BLENDING},
    Operation.SEED_OPERATION_STABILIZE: {BLENDING: SHADOWING},
    Operation.SEED_OPERATION_EVALUATE: {SHADOWING: PROBATIONARY},
    Operation.SEED_OPERATION_FINE_TUNE: {SHADOWING: SHADOWING, PROBATIONARY: PROBATIONARY},
    Operation.SEED_OPERATION_FOSSILIZE: {PROBATIONARY: FOSSILIZED},
    Operation.SEED_OPERATION_CULL: dict.fromkeys(LIVE, CULLED),
    Operation.SEED_OPERATION_CANCEL: {GERMINATED: CULLED, TRAINING: CULLED},
}


def target_of(operation: Operation.ValueType, stage: Stage.ValueType) -> Stage.ValueType | None:
    """Return the stage that an operation leads to from a stage, None when it is not legal there."""
    return OPERATIONS.get(operation, {}).get(stage)


def is_legal(before: Stage.ValueType, after: Stage.ValueType) -> bool:
    """Whether a seed may move from one stage to another."""
    return after in TRANSITIONS[before]
