from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_rpc.errors import ConfigError
from esper_servers.tolaria.emergency.escalation import (
    FAST,
    FULL,
    EmergencyConfig,
    Escalation,
    Trigger,
    called_for_by,
)
from esper_servers.tolaria.emergency.levels import CONSERVATIVE, ELEVATED, HALT
from esper_servers.tolaria.rollback.rollback import RollbackResult

EXPLODED = Trigger(CONSERVATIVE, "loss_exploded", FAST)


@pytest.fixture
def warm():
    escalation = Escalation()
    for _ in range(10):
        assert escalation.step(1.0) is None
    return escalation


def test_the_figures_of_the_requirements_are_the_defaults():
    assert (EmergencyConfig().loss_explosion, EmergencyConfig().allow_remote_halt) == (15.0, False)


@pytest.mark.parametrize(("loss", "trigger"), [(15.0, None), (15.01, EXPLODED), (1e30, EXPLODED)])
def test_a_loss_of_more_than_fifteen_times_calls_for_a_fast_rollback(warm, loss, trigger):
    assert warm.step(loss) == trigger


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_does_so_from_the_first_step_on(loss):
    assert Escalation().step(loss) == Trigger(CONSERVATIVE, "loss_not_finite", FAST)


def test_an_explosion_is_told_once_until_the_loss_is_back_or_the_run_was_rolled_back(warm):
    assert [warm.step(100.0), warm.step(100.0), warm.step(math.nan)] == [EXPLODED, None, None]
    assert [warm.step(1.0), warm.step(100.0)] == [None, EXPLODED]
    assert warm.rolled_back(FAST, is_late=False) is None
    assert warm.step(100.0) == EXPLODED


def test_the_loss_is_held_against_what_it_was_over_many_steps(warm):
    # The smoothed loss is 1.9 after it, so that 28 is no explosion and 29 is one.
    assert warm.step(10.0) is None
    assert warm.step(28.0) is None
    other = Escalation()
    for loss in [1.0] * 10 + [10.0]:
        other.step(loss)
    assert other.step(29.0) == EXPLODED


def test_a_run_that_begins_is_not_judged():
    escalation = Escalation()
    assert [escalation.step(loss) for loss in (1e-9, 1.0, 100.0)] == [None] * 3


@given(st.lists(st.floats(max_value=0), min_size=20))
def test_a_loss_that_is_never_above_zero_does_not_explode(losses):
    escalation = Escalation()
    reasons = {trigger.reason for loss in losses if (trigger := escalation.step(loss))}
    assert reasons <= {"loss_not_finite"}


@given(st.lists(st.one_of(st.floats(), st.booleans(), st.none()), max_size=60))
def test_nothing_that_happens_raises(history):
    escalation = Escalation()
    for event in history:
        if isinstance(event, bool):
            escalation.epoch(failed=event, accuracy=None)
        elif event is None:
            escalation.may_roll_back()
        else:
            escalation.step(event)
            escalation.epoch(failed=False, accuracy=event)


def test_three_failed_epochs_in_a_row_halt_the_run():
    escalation = Escalation()
    found = [escalation.epoch(failed=failed) for failed in (True, True, False, True, True, True)]
    assert found == [None] * 5 + [Trigger(HALT, "epochs_failed")]


def test_an_accuracy_that_collapses_calls_for_a_full_rollback():
    escalation = Escalation()
    found = [escalation.epoch(failed=False, accuracy=accuracy) for accuracy in (0.8, 0.41, 0.39, math.nan)]
    assert found == [None, None, Trigger(ELEVATED, "accuracy_collapsed", FULL), None]


@pytest.mark.parametrize(("tier", "level"), [(FAST, CONSERVATIVE), (FULL, HALT)])
def test_a_rollback_that_is_late_has_consequences(tier, level):
    assert Escalation().rolled_back(tier, is_late=False) is None
    assert Escalation().rolled_back(tier, is_late=True) == Trigger(level, "rollback_late")


def test_a_fast_rollback_that_fails_becomes_a_full_one_and_that_a_halt():
    assert Escalation().rollback_failed(FAST) == Trigger(CONSERVATIVE, "rollback_failed", FULL)
    assert Escalation().rollback_failed(FULL) == Trigger(HALT, "rollback_failed")


def test_one_rollback_too_many_in_an_epoch_halts_the_run(warm):
    for _ in range(3):
        assert warm.may_roll_back() is None
        warm.rolled_back(FAST, is_late=False)
    assert warm.may_roll_back() == Trigger(HALT, "too_many_rollbacks")
    warm.epoch(failed=False)
    assert warm.may_roll_back() is None


@pytest.mark.parametrize(
    ("result", "trigger"),
    [
        ({"tier": "fast", "elapsed_ms": 500.0}, None),
        ({"tier": "full", "elapsed_ms": 501.0}, Trigger(CONSERVATIVE, "rollback_slow")),
        ({"tier": "full", "elapsed_ms": 12_100.0, "is_late": True}, Trigger(HALT, "rollback_late")),
        ({"elapsed_ms": 900.0, "has_changed": True}, Trigger(HALT, "rollback_failed")),
        ({"elapsed_ms": 900.0}, None),
    ],
    ids=["in time", "slow", "late", "between two states", "as it was"],
)
def test_a_rollback_calls_for_what_it_has_done_to_the_run(result, trigger):
    assert called_for_by(RollbackResult(reason="loss_spike", severity=ELEVATED, **result)) == trigger


def test_a_setting_out_of_range_names_itself():
    with pytest.raises(ConfigError, match="loss_explosion"):
        EmergencyConfig(loss_explosion=1.0)
