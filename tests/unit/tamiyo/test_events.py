from __future__ import annotations

import asyncio
import time

import pytest
import structlog

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_rpc.proto.tamiyo.v1 import EvaluateEpochRequest, EvaluateStepRequest, EvaluateStepsResponse, Step
from esper_rpc.telemetry.events import listen
from esper_servers.tamiyo.conservative_mode import ConservativeMode
from esper_servers.tamiyo.risk.config import RiskConfig

CALM = {"loss": 0.5, "gradient_norm": 1.0, "samples_per_s": 4000.0, "hook_latency_ms": 1.0}


@pytest.fixture
def told(controller):
    """Ask one step and return the events that it told, by name."""

    def ask(sequence, metrics, *, budget_us=5_000_000):
        packet = SystemStatePacket(training_metrics=metrics, global_step=1000 + sequence)
        step = Step(run_id="run", sequence=sequence, budget_us=budget_us, packet=packet)
        raw = EvaluateStepRequest(step=step).SerializeToString()
        with structlog.testing.capture_logs() as logs:
            asyncio.run(controller.pipeline.evaluate_in_band(raw, controller.owner))
            controller.pipeline.report()
        return {entry["event"]: entry for entry in logs}

    return ask


def test_a_step_that_runs_out_of_time_is_told_with_its_budget_once_in_a_while(told):
    event = told(1, CALM, budget_us=1)["timeout_inference"]
    assert (event["reason"], event["priority"], event["step_index"], event["run_id"]) == (
        "budget_exhausted", "HIGH", 1001, "run",
    )  # fmt: skip
    assert event["timeout_budget_ms"] == pytest.approx(0.001)
    assert event["spent_ms"] > event["timeout_budget_ms"]
    assert event["spent_ms"] >= event["queue_ms"] + event["inference_ms"]
    quiet = RiskConfig().cool_down_steps
    again = [sequence for sequence in range(2, quiet + 3) if "timeout_inference" in told(sequence, CALM, budget_us=1)]
    assert again == [1 + quiet]


def test_a_step_in_time_tells_of_no_timeout(told):
    assert told(1, CALM) == {}


@pytest.fixture
def heard():
    """Every event that is told."""
    packets = []
    stop = listen(packets.append)
    yield packets
    stop()


def test_a_policy_that_fails_is_told_once_in_a_while_when_the_answer_has_left(told, heard, controller, monkeypatch):
    monkeypatch.setattr(type(controller.policy), "evaluate", lambda *_: 1 / 0)
    packet = SystemStatePacket(training_metrics=CALM, global_step=1001)
    controller.answer(1, packet)
    assert heard == []
    controller.pipeline.report()
    (event,) = (event for packet in heard for event in packet.events)
    attributes = dict(event.attributes)
    assert event.description == attributes["reason"] == "inference_failed"
    assert (attributes["priority"], attributes["step_index"], attributes["run_id"]) == ("HIGH", "1001", "run")
    assert (attributes["policy_version"], attributes["plan"]) == (controller.policy.version, controller.policy.plan)
    assert "ZeroDivisionError" in attributes["error"]
    assert float(attributes["timeout_budget_ms"]) == 5000
    controller.pipeline.breakers.renew("inference")
    assert "inference_failed" not in told(2, CALM)


def test_a_pause_is_told_with_its_cause(told):
    events = told(1, CALM | {"loss": float("nan")})
    pause = events["pause_triggered"]
    assert (pause["reason"], pause["priority"], pause["step_index"]) == ("loss_not_finite", "HIGH", 1001)
    assert pause["command_id"] == events["command_issued"]["command_id"]


def test_an_epoch_is_decided_within_two_seconds_and_its_event_tells_so(controller, heard):
    packet = SystemStatePacket(training_metrics=CALM | {"loss": float("nan")})
    raw = EvaluateEpochRequest(run_id="run", sequence=1, packet=packet).SerializeToString()
    asyncio.run(controller.pipeline.evaluate_epoch(raw, controller.owner, time.perf_counter()))
    controller.pipeline.report()
    budgets = [event.attributes.get("timeout_budget_ms") for packet in heard for event in packet.events]
    assert "2000.0" in budgets
    late = EvaluateEpochRequest(run_id="run", sequence=2, packet=packet).SerializeToString()
    answer = asyncio.run(controller.pipeline.evaluate_epoch(late, controller.owner, time.perf_counter() - 2.1))
    assert EvaluateStepsResponse.FromString(answer).decision.no_action.reason == "budget_exhausted"


@pytest.mark.parametrize(
    ("known", "level", "priority"),
    [
        ((), "error", "HIGH"),
        (("samples_per_s",), "error", "HIGH"),
        (("samples_per_s", "hook_latency_ms"), "warning", "NORMAL"),
        (("samples_per_s", "hook_latency_ms", "gradient_norm"), "warning", "NORMAL"),
    ],
)
def test_degraded_inputs_are_as_urgent_as_little_is_known(told, known, level, priority):
    event = told(1, {name: CALM[name] for name in known})["degraded_inputs"]
    assert (event["log_level"], event["priority"], event["step_index"]) == (level, priority, 1001)


def test_a_decision_has_reason_priority_and_step(controller):
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_GERMINATED, **CALM)
    packet.global_step = 77
    annotations = controller.decisions.explain(controller.ask(1, packet)).command.annotations
    assert [annotations[name] for name in ("reason", "priority", "step_index")] == ["policy", "NORMAL", "77"]


def test_a_decision_is_replayed_with_its_step_and_priority(controller):
    packet = controller.packet(Stage.SEED_LIFECYCLE_STAGE_GERMINATED, **(CALM | {"loss": float("inf")}))
    packet.global_step = 77
    command_id = controller.ask(1, packet)
    assert controller.decisions.explain(command_id).command.annotations["priority"] == "HIGH"
    assert controller.replay.differences(command_id) == []


def test_conservative_mode_is_told_when_it_begins_and_when_it_ends():
    mode = ConservativeMode(run_id="run")
    with structlog.testing.capture_logs() as logs:
        mode.enter("loss_not_finite")
        mode.enter("loss_spike")
        mode.leave()
        mode.leave()
    assert [(e["event"], e["reason"], e["priority"], e["run_id"]) for e in logs] == [
        ("conservative_entered", "loss_not_finite", "HIGH", "run"),
        ("conservative_exited", "loss_spike", "NORMAL", "run"),
    ]
