"""Of the steps that get no command, every hundredth of a run is recorded like one that does."""

from __future__ import annotations

import pytest

from esper_rpc.errors import FailedPrecondition, NotFound
from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_servers.tamiyo.choosing import INFERENCE_FAILED
from esper_servers.tamiyo.records.decisions import KIND
from esper_servers.tamiyo.reporting import STEPS_PER_SAMPLE


def test_every_hundredth_is_recorded_and_no_other(controller):
    assert controller.train(2 * STEPS_PER_SAMPLE + 10) == []
    controller.decisions.flush()
    assert [record.key for record in controller.journal.read(KIND)] == ["run/100", "run/200"]


def test_it_is_explained_and_replayed_bit_for_bit(controller):
    controller.train(STEPS_PER_SAMPLE)
    record = controller.decisions.explain("run/100")
    assert not record.HasField("command")
    assert record.reason
    assert record.packet.training_metrics["gradient_norm"] == pytest.approx(0.9)
    assert record.evidence.outputs
    assert controller.replay.differences("run/100") == []


def test_what_would_now_be_a_command_is_a_difference(controller):
    controller.train(STEPS_PER_SAMPLE)

    def germinated(record):
        for state in record.packet.seed_states:
            state.stage = Stage.SEED_LIFECYCLE_STAGE_GERMINATED

    controller.change("run/100", germinated)
    found = controller.replay.differences("run/100")
    assert "command: recorded nothing, now one" in found
    assert "command.command_type: recorded COMMAND_TYPE_UNSPECIFIED, now COMMAND_TYPE_SEED" in found


def test_a_command_at_that_sequence_is_recorded_once_under_its_own_name(controller):
    controller.train(STEPS_PER_SAMPLE - 1)
    command_id = controller.step(STEPS_PER_SAMPLE, stage=Stage.SEED_LIFECYCLE_STAGE_GERMINATED, loss=0.6)
    assert controller.decisions.explain(command_id).command.command_id == command_id
    with pytest.raises(NotFound, match="run/100"):
        controller.decisions.explain("run/100")


def test_where_nothing_was_decided_nothing_is_decided_again(controller, monkeypatch):
    controller.train(STEPS_PER_SAMPLE - 1)
    with monkeypatch.context() as patched:
        patched.setattr(controller.pipeline.policy, "evaluate", lambda *_: 1 / 0)
        assert controller.step(STEPS_PER_SAMPLE, loss=0.6) == ""
    assert controller.decisions.explain("run/100").reason == INFERENCE_FAILED
    with pytest.raises(FailedPrecondition, match=INFERENCE_FAILED) as caught:
        controller.replay.differences("run/100")
    assert caught.value.reason == "NOT_REPLAYABLE"


def test_the_next_step_may_come_before_it_is_recorded(controller):
    controller.train(STEPS_PER_SAMPLE - 1)
    controller.answer(STEPS_PER_SAMPLE, controller.packet(Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, loss=0.6))
    controller.answer(STEPS_PER_SAMPLE + 1, controller.packet(Stage.SEED_LIFECYCLE_STAGE_FOSSILIZED, loss=9.0))
    controller.pipeline.report()
    assert controller.decisions.explain("run/100").packet.training_metrics["loss"] == pytest.approx(0.6)
    assert controller.replay.differences("run/100") == []
