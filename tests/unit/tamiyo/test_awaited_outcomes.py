"""Commands of which nobody tells what became of them."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from esper_rpc.proto.leyline.v1 import CommandOutcome, SystemStatePacket
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.tamiyo.v1 import EvaluateStepRequest, Step
from esper_servers.policy import sample
from esper_servers.tamiyo.awaited_outcomes import MOST_MISSING, PATIENCE_STEPS, AwaitedOutcomes
from esper_servers.tamiyo.conservative_mode import COOL_DOWN_SECONDS, EXIT_SUCCESSES

GERMINATED = Stage.SEED_LIFECYCLE_STAGE_GERMINATED


@pytest.fixture
def awaited():
    return AwaitedOutcomes()


def wait(awaited, steps):
    return [awaited.note([], "") for _ in range(steps)]


def test_several_in_a_row_that_do_not_come_back_are_too_many(awaited):
    for number in range(MOST_MISSING):
        assert not awaited.note([], str(number))
    assert wait(awaited, PATIENCE_STEPS + 1).count(True) == 1
    assert not any(wait(awaited, 100))


def test_one_that_comes_back_at_the_last_step_is_not_missing(awaited):
    for _ in range(MOST_MISSING + 1):
        assert not awaited.note([], "command")
        assert not any(wait(awaited, PATIENCE_STEPS - 1))
        assert not awaited.note(["command"], "")
    assert not any(wait(awaited, 100))


def test_one_outcome_among_them_begins_the_count_anew(awaited):
    for number in range(MOST_MISSING - 1):
        awaited.note([], str(number))
    wait(awaited, PATIENCE_STEPS + 1)
    awaited.note([], "told")
    awaited.note(["told"], "")
    awaited.note([], "missing")
    assert not any(wait(awaited, 100))


def test_an_outcome_of_an_unknown_command_does_not_count(awaited):
    for number in range(MOST_MISSING):
        awaited.note(["forged"], str(number))
    assert any(awaited.note(["forged"], "") for _ in range(PATIENCE_STEPS + 1))


def entries():
    labels = {"scope": "run", "cause": "outcomes_missing"}
    return REGISTRY.get_sample_value("esper_conservative_entries_total", labels) or 0.0


def held_back(controller, steps, *, tells):
    """Take steps that are all due for a command; after how many the run was held back."""
    run, outcomes = controller.pipeline.runs.find("run"), []
    for sequence in range(1, steps + 1):
        packet = SystemStatePacket(training_metrics={"loss": 0.5}, seed_states=sample.sample_states(GERMINATED))
        step = Step(run_id="run", sequence=sequence, budget_us=5_000_000, packet=packet, outcomes=outcomes)
        command_id = controller.send(EvaluateStepRequest(step=step))
        outcomes = [CommandOutcome(command_id=command_id, result=CommandOutcome.RESULT_APPLIED)] * bool(command_id)
        outcomes = outcomes if tells else []
        if run.mode.enabled:
            return sequence
    return None


def test_a_run_that_never_tells_is_held_back_and_only_for_a_while(controller):
    before, run = entries(), controller.pipeline.runs.find("run")
    with capture_logs() as told:
        assert held_back(controller, 60, tells=False) is not None
    (entered,) = [entry for entry in told if entry["event"] == "conservative_entered"]
    assert (entered["reason"], entered["run_id"]) == ("outcomes_missing", "run")
    assert entries() == before + 1
    assert not controller.pipeline.mode.enabled
    run.mode._entered_at -= COOL_DOWN_SECONDS
    for _ in range(EXIT_SUCCESSES):
        run.mode.record_success()
    assert not run.mode.enabled


def test_a_run_that_tells_is_not_held_back(controller):
    assert held_back(controller, 60, tells=True) is None
