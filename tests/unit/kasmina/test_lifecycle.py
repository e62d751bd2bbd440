from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage, SeedOperation
from esper_servers.kasmina import lifecycle as life

# Written out a second time, from requirements 4.3, so that a slip in the table shows.
DOCUMENTED = {
    (life.DORMANT, life.GERMINATED), (life.GERMINATED, life.TRAINING), (life.TRAINING, life.BLENDING),
    (life.BLENDING, life.SHADOWING), (life.SHADOWING, life.PROBATIONARY), (life.PROBATIONARY, life.FOSSILIZED),
    (life.GERMINATED, life.CULLED), (life.TRAINING, life.CULLED), (life.BLENDING, life.CULLED),
    (life.SHADOWING, life.CULLED), (life.PROBATIONARY, life.CULLED), (life.CULLED, life.EMBARGOED),
    (life.EMBARGOED, life.RESETTING), (life.RESETTING, life.DORMANT),
}  # fmt: skip
STAGES = [stage for stage in SeedLifecycleStage.values() if stage]
OPERATIONS = [operation for operation in SeedOperation.values() if operation]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STAGES, STAGES)))
def test_a_move_is_legal_exactly_when_the_documents_name_it(before, after):
    torn_down = after == life.TERMINATED and before != life.TERMINATED
    assert life.is_legal(before, after) == (torn_down or (before, after) in DOCUMENTED)


@pytest.mark.parametrize("operation", OPERATIONS, ids=SeedOperation.Name)
def test_every_operation_is_offered_somewhere(operation):
    assert any(life.target_of(operation, stage) is not None for stage in STAGES)


@given(st.lists(st.sampled_from(OPERATIONS), max_size=60))
def test_no_sequence_of_operations_leaves_the_legal_moves(operations):
    stage = life.DORMANT
    for operation in operations:
        after = life.target_of(operation, stage)
        if after is None:
            continue
        assert after == stage or (stage, after) in DOCUMENTED
        stage = after
    assert stage in STAGES


def test_cancel_ends_only_what_does_not_blend_yet():
    allowed = [s for s in STAGES if life.target_of(SeedOperation.SEED_OPERATION_CANCEL, s) is not None]
    assert allowed == [life.GERMINATED, life.TRAINING]


def test_an_operation_of_a_later_schema_leads_nowhere():
    assert all(life.target_of(99, stage) is None for stage in STAGES)
