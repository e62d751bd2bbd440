from __future__ import annotations

import math

import numpy as np
import pytest

from esper_rpc.proto.leyline.v1 import SeedLifecycleStage as Stage
from esper_rpc.proto.leyline.v1 import SystemStatePacket
from esper_servers.policy import sample
from esper_servers.tamiyo.risk.config import RiskConfig

METRICS = {
    "loss": (0.3, 1.2), "gradient_norm": (0.0, 12.0), "samples_per_s": (0.0, 5000.0), "hook_latency_ms": (0.0, 70.0),
    "step_latency_ms": (10.0, 122.0), "grad_var": (0.0, 1.1), "optimizer_lr": (0.0, 0.1), "cpu_util_percent": (0.0, 97.0),
    "kasmina.apply_ms": (0.0, 31.0), "loss_delta": (-0.2, 0.2), "kasmina.breaker.state": (0.0, 1.0),
}  # fmt: skip
STAGES = [Stage.SEED_LIFECYCLE_STAGE_DORMANT, Stage.SEED_LIFECYCLE_STAGE_GERMINATED,
          Stage.SEED_LIFECYCLE_STAGE_TRAINING, Stage.SEED_LIFECYCLE_STAGE_CULLED]  # fmt: skip


def slow_hooks(controller):
    controller.train(60)
    return [controller.step(61 + i, loss=0.6, gradient_norm=0.9, hook_latency_ms=80.0) for i in range(3)][-1]


def scattered_gradient(controller):
    germinated = Stage.SEED_LIFECYCLE_STAGE_GERMINATED
    controller.train(60)
    return controller.step(61, loss=0.6, gradient_norm=9.9, hook_latency_ms=1.0, stage=germinated)


def a_dangerous_blueprint(controller):
    controller.train(60, stage=Stage.SEED_LIFECYCLE_STAGE_DORMANT)
    controller.fill_catalogue(bsds_hazard_band="CRITICAL")
    return controller.train(1, stage=Stage.SEED_LIFECYCLE_STAGE_TRAINING)[0]


def high_risk_again_and_again(controller):
    return [controller.step(1 + i, loss=math.nan) for i in range(3)][-1]


def conservative_mode(controller):
    return [controller.step(1 + i, loss=math.nan) for i in range(4)][-1]


@pytest.fixture
def eager_to_act(start, policy):
    """A controller that rests a single step only between what the risk demands."""
    return start(policy, risk_config=RiskConfig(cool_down_steps=1))


@pytest.mark.parametrize(
    ("decide", "reason", "holds", "conservative", "memory"),
    [
        (slow_hooks, "hook_budget", False, False, {"risk.slow_hooks": 2}),
        (scattered_gradient, "gradient_volatility", False, False, {"risk.adjusted": 0}),
        (a_dangerous_blueprint, "bsds_hazard_critical", True, False, {"risk.high_steps": 0}),
        (high_risk_again_and_again, "loss_not_finite", True, False, {"risk.high_steps": 2}),
        (conservative_mode, "loss_not_finite", True, True, {"risk.high_steps": 3}),
    ],
)
def test_what_the_risk_remembered_is_replayed_bit_for_bit(eager_to_act, decide, reason, holds, conservative, memory):
    command_id = decide(eager_to_act)
    record = eager_to_act.decisions.explain(command_id)
    evidence = record.evidence
    assert (record.reason, evidence.verdict.holds, evidence.conservative) == (reason, holds, conservative)
    assert memory.items() <= dict(evidence.memory).items()
    assert eager_to_act.replay.differences(command_id) == []


def test_whatever_a_run_goes_through_its_decisions_are_replayed(eager_to_act):
    drawn = np.random.default_rng(11)
    commands = [eager_to_act.ask(1 + i, a_packet(drawn)) for i in range(250)]
    made = [command_id for command_id in commands if command_id]
    reasons = {eager_to_act.decisions.explain(command_id).reason for command_id in made}
    assert len(reasons) > 8, reasons
    assert [eager_to_act.replay.differences(command_id) for command_id in made] == [[]] * len(made)


def a_packet(drawn):
    """Metrics of which some are missing and a few are not numbers, and seeds in any stage."""
    known = {name: drawn.uniform(low, high) for name, (low, high) in METRICS.items() if drawn.random() < 0.5}
    spoilt = {name: math.nan for name in known if drawn.random() < 0.01}
    packet = SystemStatePacket(
        training_metrics=known | spoilt, seed_states=sample.sample_states(STAGES[drawn.integers(len(STAGES))])
    )
    if drawn.random() < 0.5:
        device = packet.hardware_context
        device.device_type, device.total_memory_gb, device.available_memory_gb = "cuda", 80, drawn.uniform(11, 80)
    return packet


def forget_hooks(record):
    record.evidence.memory["risk.slow_hooks"] = 0


def forget_gradient(record):
    del record.evidence.memory["gradient.fast"]


def forget_blueprints(record):
    record.evidence.planted.clear()


def forget_high_steps(record):
    record.evidence.memory["risk.high_steps"] = 0


def already_adjusted(record):
    record.evidence.memory["risk.adjusted"] = 1


@pytest.mark.parametrize(
    ("decide", "spoil", "names"),
    [
        (slow_hooks, forget_hooks, {"evidence.verdict.forced_kind", "evidence.verdict.readings.latency.demand"}),
        (scattered_gradient, forget_gradient, {"evidence.verdict.reason", "reason"}),
        (a_dangerous_blueprint, forget_blueprints, {"evidence.verdict.readings.blueprint", "command.command_type"}),
        (high_risk_again_and_again, forget_high_steps, {"evidence.verdict.holds"}),
        (scattered_gradient, already_adjusted, {"command.command_type"}),
    ],
)
def test_what_the_risk_forgot_is_named(eager_to_act, decide, spoil, names):
    command_id = decide(eager_to_act)
    eager_to_act.change(command_id, spoil)
    found = eager_to_act.replay.differences(command_id)
    assert names <= {line.partition(":")[0] for line in found}, found
